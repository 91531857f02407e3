"""Reads of experts through the page cache against past it, and from packed records against as published.

    exo-kimi bench expert-reads [--disk DIR] [--rounds N]

Experts in no order, as many at a time as a token misses, straight into the memory of slots. Files are dropped from the page cache
before each run, so that reads come from the disk of DIR; the last row reads them from the cache.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from exo_kimi.bench.frame import Result, Row, finish, taken_in_turn
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.experts.layout import LayerLayout, layouts_of
from exo_kimi.experts.packed import FOLDER, pack_directory, packed_layout
from exo_kimi.experts.store import ExpertStore, SlotOrder, SlotViews

SHAPE: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "moe_intermediate_size": 1024,
    "n_routed_experts": 64,
    "num_experts_per_tok": 8,
}
MISSING = 4


@dataclass(frozen=True, slots=True)
class Disk:
    """A checkpoint in the official layout, and its experts in packed records.

    Args:
        directory: of both.
        published, packed: the layer with experts.
    """

    directory: Path
    published: LayerLayout
    packed: LayerLayout

    def speed(self, layout: LayerLayout, *, direct: bool, drops: bool = True) -> float:
        """Bytes a second of every expert once, MISSING at a time.

        Args:
            layout: one of the two.
            direct: past the page cache.
            drops: the files from the page cache, before.
        """
        files = sorted({part.entry.file for expert in range(layout.experts) for part in layout.expert_bytes(expert)})
        if drops:
            for file in files:
                forget(self.directory / file)
        store = ExpertStore(self.directory, direct=direct)
        store.open(layout)
        if store.is_direct != direct:
            raise RuntimeError("the file system has no reads past the page cache")
        slots = [_slot(layout) for _ in range(MISSING)]
        experts = random.Random(1).sample(range(layout.experts), layout.experts)
        started_s = time.perf_counter()
        for start in range(0, len(experts), MISSING):
            orders = zip(experts[start : start + MISSING], slots, strict=True)
            store.begin([SlotOrder(layout, expert, slot) for expert, slot in orders]).wait()
        return store.counters.read_bytes / (time.perf_counter() - started_s)

    def reads(self, layout: LayerLayout) -> float:
        """Calls of the system for one expert."""
        store = ExpertStore(self.directory)
        store.begin([SlotOrder(layout, 0, _slot(layout))]).wait()
        return float(store.counters.reads)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; the exit status."""
    parser = argparse.ArgumentParser(prog="exo-kimi bench expert-reads", description="reads of experts from disk")
    parser.add_argument("--disk", type=Path, metavar="DIR", help="on which disk (default: the temporary directory's)")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of runs (default 5)")
    options = parser.parse_args(arguments)
    return finish(measure(options.disk, options.rounds), options)


def measure(folder: Path | None, rounds: int) -> Result:
    """All rows."""
    if not hasattr(os, "posix_fadvise"):
        return Result(bench="expert-reads", skipped="this system drops no file from its page cache")
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        disk = made(Path(temporary) / "checkpoint")
        speed = disk.speed
        published, packed = disk.published, disk.packed
        runs = [
            ("past the page cache, over through it", (published, True, True), (published, False, True)),
            ("packed records, over as published, through the cache", (packed, False, True), (published, False, True)),
            ("packed records, over as published, past the cache", (packed, True, True), (published, True, True)),
            ("from the page cache, over past it", (published, False, False), (published, True, True)),
        ]
        rows = []
        for name, *both in runs:
            ours, theirs = (partial(speed, layout, direct=direct, drops=drops) for layout, direct, drops in both)
            pairs = [(one / 1e9, other / 1e9) for one, other in taken_in_turn(ours, theirs, rounds=rounds)]
            rows.append(Row.of_pairs(name, pairs, unit="GB/s", inverse=True))
        counts = [(disk.reads(packed), disk.reads(published))]
        rows.append(
            Row.of_pairs("reads of an expert", counts, unit="reads", inverse=True, bar=1.0, direction="at most")
        )
    size = published.disk_bytes / 1e6
    notes = [
        f"{published.experts} experts of {size:.1f} MB each, official INT4, {MISSING} at a time; bytes of the disk"
    ]
    return Result(bench="expert-reads", against="the other way of reading", rows=rows, notes=notes)


def made(directory: Path) -> Disk:
    """Written to the disk, and on it."""
    make_tiny(directory, layout="int4", shards=1, config=SHAPE)
    pack_directory(directory, say=lambda _: None)
    for path in (*directory.glob("*.safetensors"), *(directory / FOLDER).iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # pages that are not written yet cannot be dropped
    (layout,) = layouts_of(Checkpoint(directory).manifest().sources).values()
    return Disk(directory, layout, packed_layout(layout, directory))


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _slot(layout: LayerLayout) -> SlotViews:
    return [{leaf.name: memoryview(bytearray(leaf.nbytes)) for leaf in each.leaves} for each in layout.projections]
