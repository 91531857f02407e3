"""All checks of this machine, one after the other, into one JSON file that `plan` reads as a profile."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from exo_kimi.errors import UsageError
from exo_kimi.owner.verify import machine
from exo_kimi.owner.verify.check import CheckResult, VerifyCheck, run_check
from exo_kimi.owner.verify.ops import verify_ops
from exo_kimi.planner.machines.local import local_profile
from exo_kimi.runtime.protocol.versions import Versions

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions:
    """What `exo-kimi verify` was told.

    Args:
        checkpoint: for a real layer.
        layer: of it; None takes the last.
        plan: for its wired limit.
        link: HOST:PORT of another machine.
        only: names of checks; empty: all.
    """

    checkpoint: Path | None = None
    layer: int | None = None
    plan: Path | None = None
    link: str | None = None
    only: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """What measures this machine and a link to another: the benches'."""

    machine: Callable[[], dict[str, Any]]
    link: Callable[[str, int], Mapping[str, float]]


def verify(
    options: VerifyOptions, measures: Measures, *, say: Callable[[str], None] = lambda _: None
) -> tuple[dict[str, Any], bool]:
    """Run the checks.

    Args:
        options: see there.
        measures: see there.
        say: told each line as it comes.

    Returns:
        The table for the file, and whether no check failed.

    Raises:
        UsageError: no check is called so.
    """
    profile: dict[str, Any] = local_profile()

    def measured() -> CheckResult:
        profile.update(measures.machine())
        found = profile["measured"]
        rate, flops = found["bandwidth_bytes_per_s"], found["prefill_flops_per_s"]
        good = rate > 0 and flops > 0
        return CheckResult.of(good, f"{rate / 1e9:.1f} GB/s, {flops / 1e12:.2f} TFLOP/s in prefill", **found)

    def layer() -> CheckResult:
        if options.checkpoint is not None and "bandwidth_bytes_per_s" not in profile["measured"]:
            profile.update(measures.machine())
        slack = machine.LAYER_SLACK if mx.metal.is_available() else None
        return machine.real_layer(options.checkpoint, profile, layer=options.layer, slack=slack)

    checks = (
        VerifyCheck(name="ops", shows="every operation that the model uses, against numpy in float64", run=verify_ops),
        VerifyCheck(name="answers", shows="the tiny Kimi's answers", run=machine.tiny_answers),
        VerifyCheck(name="reads", shows="preadv into MLX's memory", run=machine.read_into_arrays),
        VerifyCheck(name="pieces", shows="early pieces of a decode step against none", run=machine.early_pieces),
        VerifyCheck(name="wired", shows="the wired limit", run=partial(machine.wired_limit, options.plan)),
        VerifyCheck(name="profile", shows="bandwidth, compute and overhead", run=measured),
        VerifyCheck(name="layer", shows="one real layer against the profile", run=layer),
        VerifyCheck(name="link", shows="the link", run=partial(machine.link, options.link, measures.link)),
    )
    chosen = _chosen(checks, options.only)
    rows = []
    for check in chosen:
        found, took_s = run_check(check)
        say(f"{check.name:<8} {found.verdict:<8} {took_s:6.1f} s  {found.found}")
        rows.append(
            {
                "name": check.name,
                "shows": check.shows,
                "verdict": found.verdict,
                "found": found.found,
                "seconds": round(took_s, 3),
                "values": dict(found.values),
            }
        )
    versions = Versions.installed()
    table = {
        "exo_kimi_verify": FORMAT,
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": {"exo_kimi": versions.exo_kimi, "mlx": versions.mlx, "mlx_lm": versions.mlx_lm},
        "profile": profile,
        "checks": rows,
    }
    return table, all(row["verdict"] != "failed" for row in rows)


def _chosen(checks: Sequence[VerifyCheck], only: Sequence[str]) -> list[VerifyCheck]:
    names = {check.name for check in checks}
    if unknown := set(only) - names:
        raise UsageError(
            f"no check is called {sorted(unknown)[0]!r}",
            expected=", ".join(check.name for check in checks),
            where="--only",
        )
    return [check for check in checks if not only or check.name in only]


def to_json(table: Mapping[str, Any]) -> str:
    """The file's text."""
    return json.dumps(table, indent=1, allow_nan=False, default=str) + "\n"
