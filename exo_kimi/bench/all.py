"""Every comparison, one after the other, each in a process of its own; their tables, and one table of all ratios.

    exo-kimi bench all [--only NAMES] [--html report.html] [--limit SECONDS]

Prints each table when it is done, then all claims with their bars as Markdown, then one JSON line. A bench that crashes or
takes too long is a row that failed, one that lacks something installed is skipped and says what.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from exo_kimi.bench.frame import Row, figure
from exo_kimi.bench.outcome import BenchOutcome, missing, run_bench
from exo_kimi.bench.surroundings import Surroundings
from exo_kimi.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchPart:
    """One bench: its name, its options here, and after how many seconds it is stopped."""

    name: str
    limit_s: float
    options: tuple[str, ...] = ()


PARTS = (
    BenchPart(name="attention", options=("--lengths", "1,2,8,32,128"), limit_s=150.0),
    BenchPart(name="expert-streaming", limit_s=150.0),
    BenchPart(name="prefill-memory", limit_s=150.0),
    BenchPart(name="kda", options=("--rounds", "1"), limit_s=150.0),
    BenchPart(name="kv-b", limit_s=30.0),
    BenchPart(name="router", limit_s=40.0),
    BenchPart(name="cache-8bit", limit_s=60.0),
    BenchPart(name="grammar", limit_s=60.0),
    BenchPart(name="step", options=("--rounds", "2"), limit_s=100.0),
    BenchPart(name="convert", options=("--rounds", "2", "--kills", "20"), limit_s=150.0),
    BenchPart(
        name="prune", options=("--texts", "100", "--held-out", "30", "--seeds", "4", "--questions", "1"), limit_s=240.0
    ),
    BenchPart(name="load", options=("--rounds", "3"), limit_s=90.0),
    BenchPart(name="turns", limit_s=120.0),
    BenchPart(name="prefix-restart", options=("--rounds", "1"), limit_s=100.0),
    BenchPart(name="speculation", limit_s=60.0),
    BenchPart(name="drafts", options=("--rounds", "3", "--count", "1"), limit_s=150.0),
    BenchPart(name="pipeline", options=("--rounds", "4"), limit_s=170.0),
    BenchPart(name="exo", options=("--rounds", "2"), limit_s=180.0),
)
LEFT_OUT = {
    "expert-peers": "needs the environment of mlx-vlm",
    "expert-reads": "a disk's figures, not a comparison",
    "conformance": "checks and no ratios",
    "link-speed": "needs a listener on another machine",
    "share": "needs root and network namespaces",
    "plan": "a deviation and no ratio",
    "soak": "takes as long as one likes",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run them; the exit status: 1 when a bar was missed or a bench failed."""
    parser = argparse.ArgumentParser(prog="exo-kimi bench all", description="every comparison, and a table of ratios")
    parser.add_argument("--only", metavar="NAMES", help="these benches, separated by commas")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots (they need matplotlib)")
    parser.add_argument("--limit", type=float, metavar="S", help="seconds of each bench at most (default: its share)")
    arguments = parser.parse_args(argv)
    parts = chosen(arguments.only)
    if arguments.html is not None:
        _check_writable(arguments.html)
    surroundings = Surroundings.here()
    outcomes = run_parts([replace(part, limit_s=arguments.limit or part.limit_s) for part in parts])
    print(markdown(outcomes))
    if arguments.html is not None:
        from exo_kimi.bench.report import page

        arguments.html.write_text(page(outcomes, surroundings), encoding="utf-8")
        print(f"wrote {arguments.html}", file=sys.stderr)
    print(json_line(outcomes, surroundings), flush=True)
    return 1 if any(outcome.ok is False for outcome in outcomes) else 0


def chosen(only: str | None) -> list[BenchPart]:
    """The parts of these names, in the order of PARTS; all without names.

    Raises:
        UsageError: no bench has such a name.
    """
    names = {name.strip().replace("_", "-") for name in (only or "").split(",") if name.strip()}
    if unknown := names - {part.name for part in PARTS}:
        raise UsageError(
            "no such bench",
            expected=", ".join(part.name for part in PARTS),
            found=", ".join(sorted(unknown)),
            where="--only",
        )
    return [part for part in PARTS if not names or part.name in names]


def run_parts(parts: Sequence[BenchPart]) -> list[BenchOutcome]:
    """Run each and print its table."""
    outcomes = []
    for number, part in enumerate(parts, start=1):
        print(f"{number} of {len(parts)}: {part.name} ...", file=sys.stderr, flush=True)
        outcome = _run(part)
        outcomes.append(outcome)
        shown = f"{part.name}: failed: {outcome.problem}" if outcome.problem else outcome.text
        print(f"{shown}\n({outcome.seconds:.0f} s)\n", flush=True)
    return outcomes


def markdown(outcomes: Sequence[BenchOutcome]) -> str:
    """All claims as a Markdown table."""
    lines = ["| bench | claim | ours | theirs | ratio | bar | |", "|---|---|---|---|---|---|---|"]
    for outcome in outcomes:
        if outcome.skipped or outcome.problem:
            reason = outcome.skipped or outcome.problem or ""
            verdict = "skipped" if outcome.skipped else "**failed**"
            lines.append(f"| `{outcome.words}` | {reason.replace('|', ';')[:200]} | | | | | {verdict} |")
        lines += [f"| `{outcome.words}` | {' | '.join(_cells(row))} |" for row in outcome.rows]
    return "\n".join(lines)


def json_line(outcomes: Sequence[BenchOutcome], surroundings: Surroundings) -> str:
    """One JSON document; `ratio` and `bar` are those of the claim with the least margin of all."""
    claims = [(outcome.worst, outcome.bench) for outcome in outcomes]
    worst = min(
        ((row, bench) for row, bench in claims if row is not None),
        key=lambda claim: (claim[0].ok, claim[0].margin),
        default=(None, None),
    )
    ran = [outcome for outcome in outcomes if outcome.ok is not None]
    return json.dumps(
        {
            "bench": "all",
            "ratio": worst[0].ratio if worst[0] else None,
            "bar": worst[0].bar if worst[0] else None,
            "ok": bool(ran) and all(outcome.ok for outcome in ran),
            "worst": worst[1],
            "seconds": round(sum(outcome.seconds for outcome in outcomes), 1),
            "benches": [outcome.summary() for outcome in outcomes],
            **surroundings.to_dict(),
        }
    )


def _run(part: BenchPart) -> BenchOutcome:
    if find_spec(f"exo_kimi.bench.claims.{part.name.replace('-', '_')}") is None:
        return missing(part.name, "this version does not have it")
    return run_bench(part.name, part.options, limit_s=part.limit_s)


def _cells(row: Row) -> tuple[str, ...]:
    bar = "" if row.bar is None else f"{row.direction} {row.bar:.3g}"
    verdict = "ok" if row.ok else "**missed**"
    return (
        row.name,
        figure(row.ours, row.unit),
        "" if row.theirs is None else figure(row.theirs, row.unit),
        f"{row.ratio:.3g}",
        bar,
        verdict if row.bar is not None or row.equal is not None else "",
    )


def _check_writable(path: Path) -> None:
    """Told before the benches run and not after ten minutes."""
    try:
        with path.open("a"):
            pass
    except OSError as error:
        raise UsageError("cannot write the file", found=error.strerror, where=f"--html {path}") from None


if __name__ == "__main__":
    sys.exit(main())
