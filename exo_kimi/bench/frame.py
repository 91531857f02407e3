"""What every comparison shares: runs taken in turn, medians of ratios, a bar for each, a table and one JSON line last.

Ratios travel from machine to machine, times do not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, TypeVar

Direction = Literal["at least", "at most"]
Measured = TypeVar("Measured")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured claim.

    Args:
        name: what was varied, such as `L=8`.
        ours: our figure, in `unit` (a median over rounds).
        theirs: the other's; None where there is no other, as for a bound.
        unit: of both: s, bytes, tokens/s, primitives, ...
        ratio: what the bar is about; the docstring of the bench says which way it is taken.
        bar: None for a row that is only shown.
        direction: whether the ratio must be at least or at most the bar.
        low, high: quartiles of the ratio over the rounds.
        note: bytes, a roofline, whether the outputs were equal.
        equal: whether the outputs agreed, where they were compared; a row whose outputs differ never passes.
    """

    name: str
    ours: float
    theirs: float | None = None
    unit: str
    ratio: float
    bar: float | None = None
    direction: Direction = "at least"
    low: float | None = None
    high: float | None = None
    note: str = ""
    equal: bool | None = None

    @classmethod
    def of_pairs(
        cls,
        name: str,
        pairs: Sequence[tuple[float, float]],
        *,
        unit: str,
        bar: float | None = None,
        direction: Direction = "at least",
        inverse: bool = False,
        note: str = "",
        equal: bool | None = None,
    ) -> Self:
        """A row of interleaved (ours, theirs) figures: the ratio is the median of theirs / ours, or with `inverse` of
        ours / theirs."""
        ratios = [ours / theirs if inverse else theirs / ours for ours, theirs in pairs]
        low, middle, high = quartiles(ratios)
        return cls(
            name=name,
            ours=statistics.median(ours for ours, _ in pairs),
            theirs=statistics.median(theirs for _, theirs in pairs),
            unit=unit,
            ratio=middle,
            bar=bar,
            direction=direction,
            low=low,
            high=high,
            note=note,
            equal=equal,
        )

    @property
    def ok(self) -> bool:
        """Whether the bar is met and the outputs agreed."""
        if self.equal is False:
            return False
        if self.bar is None:
            return True
        return self.ratio >= self.bar if self.direction == "at least" else self.ratio <= self.bar

    @property
    def margin(self) -> float:
        """How far on the right side of its bar, as a factor; below 1 it fails."""
        if self.bar is None:
            return float("inf")
        if self.direction == "at least":
            return self.ratio / self.bar if self.bar else float("inf")
        return self.bar / self.ratio if self.ratio else float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """All rows of one bench.

    Args:
        bench: its name on the command line.
        command: what gives these rows, with every option; `finish` fills it in.
        against: what it was compared with, with its version.
        rows: at least one, unless `skipped` says why there is none.
        notes: lines below the table.
        skipped: why it could not run here, such as a peer that is not installed.
    """

    bench: str
    command: str = ""
    against: str = ""
    rows: Sequence[Row] = ()
    notes: Sequence[str] = field(default_factory=tuple)
    skipped: str | None = None

    @property
    def ok(self) -> bool | None:
        """Whether every row passes; None when skipped."""
        return None if self.skipped else bool(self.rows) and all(row.ok for row in self.rows)

    def table(self) -> str:
        """The rows as aligned text."""
        if self.skipped:
            return f"{self.bench}: skipped: {self.skipped}"
        head = ("", "ours", "theirs", "ratio", "spread", "bar", "", "")
        lines = [head, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        title = f"{self.bench}, against {self.against}" if self.against else self.bench
        command = [self.command] if self.command else []
        return "\n".join([title, *(line.rstrip() for line in text), *self.notes, *command])

    def json_line(self) -> str:
        """One JSON document; `ratio` and `bar` are those of the row with the least margin."""
        document: dict[str, Any] = {
            "bench": self.bench,
            "command": self.command,
            "against": self.against,
            "ok": self.ok,
        }
        if self.skipped:
            return json.dumps({**document, "ratio": None, "bar": None, "skipped": self.skipped})
        worst = min(self.rows, key=lambda row: (row.ok, row.margin))
        rows = [
            {**{name: getattr(row, name) for name in Row.__slots__}, "ok": row.ok, "command": self.command}
            for row in self.rows
        ]
        return json.dumps(
            {**document, "ratio": worst.ratio, "bar": worst.bar, "worst": worst.name, "rows": rows, "notes": self.notes}
        )


def finish(result: Result, options: argparse.Namespace | None = None) -> int:
    """Print a result with the command that gave it; the exit status: 0 when it passed or was skipped.

    Args:
        result: of a bench.
        options: of its command line, defaults among them.
    """
    result = replace(result, command=" ".join(["exo-kimi bench", result.bench, *_words(options)]))
    print(result.table())
    print(result.json_line(), flush=True)
    return 1 if result.ok is False else 0


def _words(options: argparse.Namespace | None) -> list[str]:
    words = []
    for name, value in vars(options or argparse.Namespace()).items():
        if value is not None and value is not False:
            words.append(f"--{name.replace('_', '-')}")
            words += [] if value is True else [",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return words


def taken_in_turn(
    ours: Callable[[], Measured], theirs: Callable[[], Measured], *, rounds: int, warm: int = 1
) -> list[tuple[Measured, Measured]]:
    """Figures of both, one after the other and the order swapped each round, so that a drift of the machine meets both.

    Args:
        ours, theirs: run once and give a figure.
        rounds: pairs that count.
        warm: pairs before them that do not.
    """
    pairs = []
    for turn in range(warm + rounds):
        if turn % 2:
            second = theirs()
            pairs.append((ours(), second))
        else:
            first = ours()
            pairs.append((first, theirs()))
    return pairs[warm:]


def seconds(function: Callable[[], object]) -> float:
    """How long a call takes; what it computes must be evaluated when it returns."""
    started_s = time.perf_counter()
    function()
    return time.perf_counter() - started_s


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def figure(value: float, unit: str) -> str:
    """A figure for a table."""
    if unit == "s":
        return f"{value * 1000:.2f} ms" if value < 1 else f"{value:.2f} s"
    if unit == "bytes":
        return f"{value / 1e6:.1f} MB"
    return f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.3g} {unit}"


def _cells(row: Row) -> tuple[str, ...]:
    spread = "" if row.low is None or row.high is None else f"{row.low:.2f}-{row.high:.2f}"
    bar = "" if row.bar is None else f"{row.direction} {row.bar:g}"
    verdict = "" if row.bar is None and row.equal is None else "ok" if row.ok else "MISSED"
    outputs = "" if row.equal is None else "outputs equal" if row.equal else "OUTPUTS DIFFER"
    note = ", ".join(part for part in (outputs, row.note) if part)
    theirs = "" if row.theirs is None else figure(row.theirs, row.unit)
    return row.name, figure(row.ours, row.unit), theirs, f"{row.ratio:.3g}", spread, bar, verdict, note
