"""Converting a checkpoint beside `mlx_lm.convert`: time, memory, error, codes, kills; each conversion in a fresh process.

Ratios: of time ours over theirs, of memory ours over the stated bound, of error ours over `mx.quantize`'s.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from exo_kimi.bench.claims.convert.child import ConvertedChild, convert_once
from exo_kimi.bench.frame import Result, Row, finish, taken_in_turn
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.sources import ModuleSource
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.compress.convert.conversion import make_conversion
from exo_kimi.compress.convert.rows import SourceRows
from exo_kimi.compress.convert.run import convert, processors
from exo_kimi.compress.ranges import RangeReader
from exo_kimi.planner.weights.recipes import load_recipe

CONFIG: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 512,
    "n_routed_experts": 16,
    "num_experts_per_tok": 8,
}
BITS = 3
ROOM_BYTES = 64 * 2**20  # of the stated bound, beside three float32 copies of the largest matrix


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it, print a table and one JSON line."""
    parser = argparse.ArgumentParser(prog="exo-kimi bench convert", description="converting beside mlx_lm.convert")
    parser.add_argument("--rounds", type=int, default=3, help="conversions of each, taken in turn (default 3)")
    parser.add_argument("--layers", type=int, default=3, help="of the smaller model; the larger has four times as many")
    parser.add_argument("--kills", type=int, default=50, help="kills at random moments (default 50)")
    options = parser.parse_args(arguments)
    return finish(measure(options.rounds, options.layers, options.kills), options)


def measure(rounds: int, layers: int, kills: int) -> Result:
    """All rows."""
    with TemporaryDirectory(prefix="convert-") as folder, _fresh_processes() as processes:
        root = Path(folder)
        small = make_tiny(root / "small", layout="bf16", config={**CONFIG, "num_hidden_layers": layers})
        rows = [*_times(processes, small, root, rounds)]
        rows += _errors(small, root)
        large = make_tiny(root / "large", layout="bf16", config={**CONFIG, "num_hidden_layers": 4 * layers})
        rows += _memory(processes, small, large, root)
        if hasattr(os, "fork"):
            rows.append(_kills(root, kills))
        weights = Checkpoint(small).manifest().disk_bytes // 2
    return Result(
        bench="convert",
        against=f"mlx_lm.convert of mlx-lm {version('mlx-lm')}",
        rows=rows,
        notes=[
            f"bf16 to {BITS} bits, groups of 64; {weights / 1e6:.0f} M weights in {layers} layers, {processors()} processors",
            "memory is what a process grows by; theirs has no bound that does not grow with the shards",
        ],
    )


def _fresh_processes() -> Executor:
    context: Any = get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload(["exo_kimi.bench.claims.convert.child"])
    return ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1)


def _run(processes: Executor, side: str, source: Path, output: Path) -> ConvertedChild:
    shutil.rmtree(output, ignore_errors=True)
    return processes.submit(convert_once, side, source, output, BITS).result()


def _times(processes: Executor, source: Path, root: Path, rounds: int) -> Iterator[Row]:
    for side, bar, name in (("mlx", 1.0, "with mx.quantize's codes"), ("search", 3.0, "search included")):
        pairs = taken_in_turn(
            lambda side=side: _run(processes, side, source, root / side),  # type: ignore[misc]
            lambda: _run(processes, "theirs", source, root / "theirs"),
            rounds=rounds,
        )
        work = median(ours.processor_s / ours.seconds for ours, _ in pairs)
        yield Row.of_pairs(
            f"time, {name}",
            [(ours.seconds, theirs.seconds) for ours, theirs in pairs],
            unit="s",
            bar=bar,
            direction="at most",
            inverse=True,
            note=f"{work:.1f} processors at work",
        )
        yield Row.of_pairs(
            f"processor time, {name}",
            [(ours.processor_s, theirs.processor_s) for ours, theirs in pairs],
            unit="s",
            inverse=True,
            note="of all processors together, which other programs do not change",
        )


def _errors(source: Path, root: Path) -> Iterator[Row]:
    """Error of the conversions that the times left, and whether the codes are theirs."""
    ours, same, theirs = (_error(source, root / side) for side in ("search", "mlx", "theirs"))
    alike = _packed(root / "mlx") == _packed(root / "theirs")
    yield Row(
        name=f"error at {BITS} bits",
        ours=ours,
        theirs=theirs,
        unit="of the weights",
        ratio=ours / theirs,
        bar=0.9,
        direction="at most",
        note="relative, of all packed modules; equal bytes",
    )
    yield Row(
        name="codes with --rounding mlx",
        ours=same,
        theirs=theirs,
        unit="of the weights",
        ratio=same / theirs,
        note="every packed tensor, byte for byte",
        equal=alike,
    )


def _error(source: Path, output: Path) -> float:
    before = {each.spec.path: each for each in Checkpoint(source).manifest().sources}
    squared = total = 0.0
    with RangeReader(source) as old, RangeReader(output) as new:
        for each in Checkpoint(output).manifest().sources:
            if each.quant is not None and each.spec.path in before:
                for wanted, found in zip(_matrices(old, before[each.spec.path]), _matrices(new, each), strict=True):
                    squared += float(np.square(found - wanted).sum(dtype=np.float64))
                    total += float(np.square(wanted).sum(dtype=np.float64))
    return float(np.sqrt(squared / total))


def _matrices(reader: RangeReader, source: ModuleSource) -> Iterator[np.ndarray[Any, np.dtype[np.float32]]]:
    rows = SourceRows(reader, source)
    for matrix in range(rows.matrices):
        yield rows.floats(matrix, 0, rows.out)


def _packed(directory: Path) -> dict[str, bytes]:
    """The bytes of every packed module's tensors."""
    found: dict[str, bytes] = {}
    with RangeReader(directory) as reader:
        for each in Checkpoint(directory).manifest().sources:
            if each.quant is not None:
                for part, entries in each.parts.items():
                    found[f"{each.spec.path}.{part}"] = reader.read(entries[0]).tobytes()
    return found


def _memory(processes: Executor, small: Path, large: Path, root: Path) -> Iterator[Row]:
    peaks = {
        (side, source): _run(processes, side, source, root / side).peak_bytes
        for side in ("search", "theirs")
        for source in (small, large)
    }
    for source, name in ((small, "memory"), (large, "memory, four times the layers")):
        specs = [each.spec for each in Checkpoint(source).manifest().sources if len(each.spec.shape) > 1]
        bound = 3 * 4 * max(spec.shape[-2] * spec.shape[-1] for spec in specs) + ROOM_BYTES
        yield Row(
            name=name,
            ours=peaks["search", source],
            theirs=peaks["theirs", source],
            unit="bytes",
            ratio=peaks["search", source] / bound,
            bar=1.0,
            direction="at most",
            note=f"of three float32 copies of the largest matrix and 64 MiB: {bound / 2**20:.0f} MiB",
        )
    yield Row(
        name="memory, growth with the layers",
        ours=peaks["search", large],
        theirs=peaks["search", small],
        unit="bytes",
        ratio=peaks["search", large] / peaks["search", small],
        bar=1.25,
        direction="at most",
        note="theirs: ours with a quarter of the layers",
    )


def _kills(root: Path, kills: int) -> Row:
    """Kills at random moments until there were as many; each output goes on to its end every few kills."""
    source = make_tiny(root / "killed", layout="bf16", config={"num_hidden_layers": 3})

    def job(output: Path) -> None:
        convert(make_conversion(Checkpoint(source), output, load_recipe("q34+q6"), shard_bytes=300_000), workers=2)

    began = time.monotonic()
    job(root / "whole")
    whole_s, chance = time.monotonic() - began, random.Random(0)
    wanted, killed, outputs, same = _everything(root / "whole"), 0, 0, True
    while killed < kills:
        output = root / f"cut{outputs}"
        for _ in range(5):
            killed += _killed(lambda output=output: job(output), chance.uniform(0, whole_s))  # type: ignore[misc]
        job(output)
        same = same and _everything(output) == wanted
        shutil.rmtree(output)
        outputs += 1
    return Row(
        name="kill -9 at random moments",
        ours=killed,
        unit="kills",
        ratio=1.0,
        note=f"{outputs} outputs went on to their end, every file the same",
        equal=same,
    )


def _killed(work: Callable[[], None], after_s: float) -> bool:
    """Whether a child that does the work was killed in the middle of it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def _everything(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}
