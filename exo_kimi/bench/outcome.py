"""One bench in a process of its own, and what came of it: its table and rows, or why there are none.

A bench that crashes, hangs or says nothing is an outcome like any other.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from exo_kimi.bench.frame import Row

COMMAND = (sys.executable, "-m", "exo_kimi", "bench")
_SHOWN_LINES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOutcome:
    """What came of one bench.

    Args:
        bench: its name.
        seconds: how long it took.
        text: what it printed, without its JSON line.
        command: what gives its rows, with every option; empty where it has none.
        against: what it was compared with.
        rows: its claims.
        notes: lines below its table.
        skipped: why it could not run here.
        problem: why it has no result: its last lines, or that it took too long.
    """

    bench: str
    seconds: float
    text: str = ""
    command: str = ""
    against: str = ""
    rows: tuple[Row, ...] = ()
    notes: tuple[str, ...] = ()
    skipped: str | None = None
    problem: str | None = None

    @property
    def words(self) -> str:
        """Its name and options, as they are given to `exo-kimi bench`."""
        return self.command.removeprefix("exo-kimi bench ") or self.bench

    @property
    def ok(self) -> bool | None:
        """Whether every row passes; None when skipped."""
        if self.skipped:
            return None
        return not self.problem and bool(self.rows) and all(row.ok for row in self.rows)

    @property
    def worst(self) -> Row | None:
        """The row with the least margin."""
        return min(self.rows, key=lambda row: (row.ok, row.margin), default=None)

    def summary(self) -> dict[str, Any]:
        """As part of a JSON document."""
        worst = self.worst
        return {
            "bench": self.bench,
            "command": self.command,
            "ratio": worst.ratio if worst else None,
            "bar": worst.bar if worst else None,
            "ok": self.ok,
            "seconds": round(self.seconds, 1),
            **({"skipped": self.skipped} if self.skipped else {}),
            **({"problem": self.problem} if self.problem else {}),
        }


def run_bench(
    bench: str, options: Sequence[str] = (), *, limit_s: float, command: Sequence[str] = COMMAND
) -> BenchOutcome:
    """Run a bench to its end, or kill it and all that it started when the time is over.

    Args:
        bench: its name, added to the command.
        options: of it, added as well.
        limit_s: most seconds.
        command: what runs benches.
    """
    started_s = time.monotonic()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [*command, bench, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,  # so that its servers and ranks end with it
        )
        late = False
        try:
            output, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            late = True
            _end(process)
            output, _ = process.communicate()
        except BaseException:
            _end(process)
            raise
        errors.seek(0)
        said = errors.read().decode(errors="replace")
    seconds = time.monotonic() - started_s
    lines = output.decode(errors="replace").rstrip().splitlines()
    problem = f"stopped after {limit_s:.0f} s" if late else None
    return _read(bench, lines, said.splitlines(), problem, process.returncode, seconds)


def missing(bench: str, reason: str) -> BenchOutcome:
    """A bench that was not run."""
    return BenchOutcome(bench=bench, seconds=0.0, text=f"{bench}: skipped: {reason}", skipped=reason)


def _read(
    bench: str, lines: list[str], errors: list[str], problem: str | None, status: int, seconds: float
) -> BenchOutcome:
    document = _document(lines[-1]) if lines else None
    if problem or document is None:
        last = [line.strip() for line in [*lines, *errors] if line.strip()][-_SHOWN_LINES:]
        problem = problem or f"no result, exit status {status}"
        return BenchOutcome(bench=bench, seconds=seconds, text="\n".join(lines), problem=" | ".join([problem, *last]))
    return BenchOutcome(
        bench=bench,
        seconds=seconds,
        text="\n".join(lines[:-1]),
        command=document.get("command", ""),
        against=document.get("against", ""),
        rows=tuple(Row(**{name: row[name] for name in Row.__slots__ if name in row}) for row in document["rows"]),
        notes=tuple(document.get("notes", ())),
        skipped=document.get("skipped"),
    )


def _document(line: str) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError):
        document = json.loads(line)
        if isinstance(document, dict) and "bench" in document and "ok" in document:
            return {"rows": [], **document}
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
