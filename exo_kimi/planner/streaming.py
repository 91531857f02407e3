"""Experts from disk, as a plan counts them: how often an expert is there, how fast the disk is, and how sure both are.

A machine that cannot hold its layers whole may hold everything but the routed experts, and S slots a layer for these. Which
experts are in the slots is a matter of the workload: `HitCurve` says how many of those asked for are there, from a trace
(`exo-kimi trace replay -o FILE`) or, until there is one, from what others have published, with a band.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from exo_kimi.errors import UsageError
from exo_kimi.planner import data
from exo_kimi.planner.machines.hardware import Machine

Numbers = TypeVar("Numbers", float, NDArray[np.float64])  # one, or one for every range of a table
Case = Literal["slow", "expected", "fast"]
CURVE_VERSION = 1
CURVE_KEYS = ("version", "source", "policy", "experts", "chosen", "tokens", "slots", "low", "hits", "high")
# The ids that the router chose must be on the CPU before it is known what to read: 0.2 to 0.35 ms a layer on Metal.
# Source: ml-explore/mlx-lm#1438.
READ_BACK_S: dict[Case, float] = {"slow": 3.5e-4, "expected": 2.5e-4, "fast": 2.0e-4}
# Published speeds of disks are of long reads by several threads; cold reads of experts have reached as little as 29 % (M5 Max, 4
# of 13.6 GB/s, JustVugg/colibri#86). A speed that was measured here, by reads of that size, is taken as it is.
DECLARED_SHARE: dict[Case, float] = {"slow": 0.5, "expected": 1.0, "fast": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class HitCurve:
    """Hit rates by the share of a layer's experts that have a slot; straight lines between the points.

    Args:
        shares: slots / experts, ascending, between 0 and 1; none is hit at 0, all at 1.
        low, hits, high: of each share: what to fear, to expect and to hope for.
        source: where they come from.
        measured: from a trace, and not from other people's models.
    """

    shares: tuple[float, ...]
    low: tuple[float, ...]
    hits: tuple[float, ...]
    high: tuple[float, ...]
    source: str
    measured: bool = False

    def at(self, share: Numbers, case: Case = "expected") -> Numbers:
        """The hit rate when `share` of the experts have a slot."""
        ends: dict[Case, tuple[float, ...]] = {"slow": self.low, "expected": self.hits, "fast": self.high}
        found: Numbers = np.interp(share, (0.0, *self.shares, 1.0), (0.0, *ends[case], 1.0))
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Streaming:
    """That machines may stream experts, and by which hit rates; `case` is the end of the band that is being predicted."""

    curve: HitCurve
    case: Case = "expected"

    @property
    def read_back_s(self) -> float:
        """Seconds of a layer until the router's choice is known to the CPU."""
        return READ_BACK_S[self.case]

    def hit_rate(self, slots: Numbers, experts: int) -> Numbers:
        """Of the experts asked for, with so many slots a layer."""
        return self.curve.at(slots / experts, self.case)

    def ssd_bytes_per_s(self, machine: Machine) -> float:
        """What a machine's disk reads in a second; zero where nobody has said it."""
        if machine.ssd is None:
            return 0.0
        return machine.ssd.number * (DECLARED_SHARE[self.case] if machine.ssd.status == "declared" else 1.0)


@cache
def default_curve() -> HitCurve:
    """Until a trace exists: what others have published of models with 64 to 896 experts, least recently used by layer."""
    table = data.load("published", "streaming")["default"]
    shares, low, hits, high = (tuple(table[key]) for key in ("shares", "low", "hits", "high"))
    return HitCurve(shares=shares, low=low, hits=hits, high=high, source=table["source"])


def read_curve(path: str | Path) -> HitCurve:
    """A curve as `exo-kimi trace replay -o FILE` writes it.

    Raises:
        UsageError: it cannot be read, has unknown keys, or is no curve.
    """
    return _curve(data.read(path, "hit rates"), path)


def parse_curve(text: str, name: str) -> HitCurve:
    """The same, of the text of such a file.

    Args:
        text: of it.
        name: what errors and the plan call it.

    Raises:
        UsageError: as of `read_curve`.
    """
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError("hit rates that are no TOML", found=str(error), where=name) from None
    return _curve(table, name)


def _curve(table: dict[str, Any], path: str | Path) -> HitCurve:
    data.refuse_unknown(table, CURVE_KEYS, path)
    missing = sorted(set(CURVE_KEYS) - set(table))
    if missing or table["version"] != CURVE_VERSION:
        raise UsageError(
            "hit rates of another version, or none",
            expected=f"version {CURVE_VERSION} with {', '.join(CURVE_KEYS)}",
            found=f"version {table.get('version')}" + (f", no {missing[0]}" if missing else ""),
            where=path,
            fix="make them again: `exo-kimi trace replay TRACE -o FILE`",
        )
    experts, slots = table["experts"], _numbers(table, "slots", path)
    rates = {key: _numbers(table, key, path) for key in ("low", "hits", "high")}
    ascending = all(one < other for one, other in pairwise(slots))
    whole = isinstance(experts, int) and bool(slots) and ascending and slots[0] > 0 and slots[-1] <= experts
    if not whole or any(len(rate) != len(slots) or not all(0 <= r <= 1 for r in rate) for rate in rates.values()):
        raise UsageError(
            "hit rates that are none",
            expected="slots from 1 to experts, ascending, and as many shares between 0 and 1 in low, hits and high",
            found=f"{len(slots)} slots, {experts} experts",
            where=path,
        )
    inner = [place for place, size in enumerate(slots) if size < experts]
    low, hits, high = (tuple(float(rates[key][place]) for place in inner) for key in ("low", "hits", "high"))
    return HitCurve(
        shares=tuple(slots[place] / experts for place in inner),
        low=low,
        hits=hits,
        high=high,
        source=f"{Path(path).name}: {table['source']}, {table['policy']}, {table['tokens']} tokens",
        measured=True,
    )


def _numbers(table: dict[str, Any], key: str, where: object) -> Sequence[float]:
    found = table[key]
    if not isinstance(found, list) or not all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in found):
        raise UsageError(f"{key} is not a list of numbers", found=repr(found)[:60], where=where)
    return found
