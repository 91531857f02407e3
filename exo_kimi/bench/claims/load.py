"""Loading a checkpoint, whole and half, beside what mlx-lm's `sharded_load` does; each load in a fresh process.

Ratios: of memory our peak over our own bytes, of time ours over theirs, of speed ours over a plain read of the same ranges.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from exo_kimi.bench.frame import Result, Row, finish, taken_in_turn
from exo_kimi.bench.setups.load_child import LoadedChild, load_once
from exo_kimi.bench.setups.random_checkpoint import SHAPE, write_random

LAYERS = SHAPE["num_hidden_layers"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it, print a table and one JSON line."""
    parser = argparse.ArgumentParser(prog="exo-kimi bench load", description="loading beside mlx-lm's sharded_load")
    parser.add_argument("--rounds", type=int, default=5, help="loads of each, taken in turn (default 5)")
    parser.add_argument(
        "--drop-caches", action="store_true", help="drop the files from the page cache before each load"
    )
    options = parser.parse_args(arguments)
    return finish(measure(options.rounds, cold=options.drop_caches), options)


def measure(rounds: int, *, cold: bool = False) -> Result:
    """Rows of the whole model and of the half with the head, from the page cache or from the disk."""
    with TemporaryDirectory(prefix="load-") as folder:
        directory = Path(folder)
        total_bytes = write_random(directory)
        with _fresh_processes() as processes:
            rows = [row for start in (0, LAYERS // 2) for row in _rows(processes, directory, start, rounds, cold=cold)]
    where = "from the disk: files dropped from the page cache before each load" if cold else "from the page cache"
    return Result(
        bench="load",
        against=f"mlx-lm {version('mlx-lm')}",
        rows=rows,
        notes=[
            f"{total_bytes / 1e9:.2f} GB in 4 bits, {where}; theirs holds embedding and head on every rank",
            "a plain read keeps nothing; one into fresh memory has the system make pages, as every load must",
        ],
    )


def _fresh_processes() -> Executor:
    """Runs each call in a process of its own, forked where that is safe from one that has imported everything."""
    context: Any = get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload(["exo_kimi.bench.setups.load_child"])
    return ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1)


def _rows(processes: Executor, directory: Path, start: int, rounds: int, *, cold: bool) -> list[Row]:
    def run(side: str, *, cold: bool = cold) -> LoadedChild:
        if cold:
            drop(directory)
        return processes.submit(load_once, side, directory, start, LAYERS).result()

    def again(side: str) -> LoadedChild:
        return run(side, cold=False)

    pairs = taken_in_turn(lambda: run("ours"), lambda: run("theirs"), rounds=rounds)
    plain = taken_in_turn(lambda: run("ours"), lambda: run("plain"), rounds=rounds)
    # Whatever was dropped before, the first pair of these brings it back, and is not counted.
    second = taken_in_turn(lambda: again("ours"), lambda: again("fresh"), rounds=rounds)
    name = f"layers {start}:{LAYERS}"
    peak_bytes = median(ours.peak_bytes for ours, _ in pairs)
    own_bytes, their_bytes = (each.own_bytes for each in pairs[0])
    return [
        Row(
            name=f"{name}, peak",
            ours=peak_bytes,
            theirs=median(theirs.peak_bytes for _, theirs in pairs),
            unit="bytes",
            ratio=peak_bytes / own_bytes,
            bar=1.05,
            direction="at most",
            note=f"own bytes {own_bytes / 1e6:.0f} MB; theirs {their_bytes / 1e6:.0f} MB",
        ),
        Row.of_pairs(
            f"{name}, time",
            [(ours.seconds, theirs.seconds) for ours, theirs in pairs],
            unit="s",
            bar=1.0,
            direction="at most",
            inverse=True,
        ),
        _speed(f"{name}, speed", plain, "theirs: a plain read of the same ranges"),
        _speed(
            f"{name}, second start", second, "from the page cache; theirs: a read of the same ranges into fresh memory"
        ),
    ]


def _speed(name: str, pairs: Sequence[tuple[LoadedChild, LoadedChild]], note: str) -> Row:
    speeds = [(ours.gb_per_s, theirs.gb_per_s) for ours, theirs in pairs]
    return Row.of_pairs(name, speeds, unit="GB/s", inverse=True, note=note)


def drop(directory: Path) -> None:
    """Drop the files of a directory from the page cache; needs no rights."""
    for path in directory.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    sys.exit(main())
