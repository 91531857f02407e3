"""Loading a checkpoint, whole and half, beside what mlx-lm's `sharded_load` does; each load in a fresh process.

Ratios: of memory our peak over our own bytes, of time ours over theirs, of speed ours over a plain read of the same ranges.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from exo_kimi.bench.frame import Result, Row, finish, taken_in_turn
from exo_kimi.bench.random_checkpoint import SHAPE, write_random

LAYERS = SHAPE["num_hidden_layers"]
Loaded = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it, print a table and one JSON line."""
    parser = argparse.ArgumentParser(prog="exo-kimi bench load", description="loading beside mlx-lm's sharded_load")
    parser.add_argument("--rounds", type=int, default=5, help="loads of each, taken in turn (default 5)")
    parser.add_argument(
        "--drop-caches", action="store_true", help="drop the files from the page cache before each load"
    )
    options = parser.parse_args(arguments)
    return finish(measure(options.rounds, cold=options.drop_caches))


def measure(rounds: int, *, cold: bool = False) -> Result:
    """Rows of the whole model and of the half with the head, from the page cache or from the disk."""
    with TemporaryDirectory(prefix="load-") as folder:
        directory = Path(folder)
        total_bytes = write_random(directory)
        rows = [row for start in (0, LAYERS // 2) for row in _rows(directory, start, rounds, cold=cold)]
    where = "from the disk: files dropped from the page cache before each load" if cold else "from the page cache"
    return Result(
        bench="load",
        against=f"mlx-lm {version('mlx-lm')}",
        rows=rows,
        notes=[f"{total_bytes / 1e9:.2f} GB in 4 bits, {where}; theirs holds embedding and head on every rank"],
    )


def _rows(directory: Path, start: int, rounds: int, *, cold: bool) -> list[Row]:
    def run(side: str) -> Loaded:
        if cold:
            drop(directory)
        command = [sys.executable, "-m", "exo_kimi.bench.load_child", side, str(directory), str(start), str(LAYERS)]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        found: Loaded = json.loads(ran.stdout)
        return found

    pairs = taken_in_turn(lambda: run("ours"), lambda: run("theirs"), rounds=rounds)
    plain = [run("plain") for _ in range(rounds)]
    name = f"layers {start}:{LAYERS}"
    peaks = [(ours["peak_bytes"], theirs["peak_bytes"]) for ours, theirs in pairs]
    own = pairs[0][0]["own_bytes"]
    speeds = [
        (each["own_bytes"] / ours["seconds"] / 1e9, _speed(each)) for (ours, _), each in zip(pairs, plain, strict=True)
    ]
    return [
        Row(
            name=f"{name}, peak",
            ours=median(ours for ours, _ in peaks),
            theirs=median(theirs for _, theirs in peaks),
            unit="bytes",
            ratio=median(ours for ours, _ in peaks) / own,
            bar=1.05,
            direction="at most",
            note=f"own bytes {own / 1e6:.0f} MB; theirs {pairs[0][1]['own_bytes'] / 1e6:.0f} MB",
        ),
        Row.of_pairs(
            f"{name}, time",
            [(ours["seconds"], theirs["seconds"]) for ours, theirs in pairs],
            unit="s",
            bar=1.0,
            direction="at most",
            inverse=True,
        ),
        Row.of_pairs(
            f"{name}, speed", speeds, unit="GB/s", inverse=True, note="theirs: a plain read of the same ranges"
        ),
    ]


def _speed(loaded: Loaded) -> float:
    return float(loaded["own_bytes"] / loaded["seconds"] / 1e9)


def drop(directory: Path) -> None:
    """Drop the files of a directory from the page cache; needs no rights."""
    for path in directory.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    sys.exit(main())
