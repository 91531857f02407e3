"""Run a conversion: blocks of rows on every processor, into shards.

Memory is that of the blocks in work, `2 * workers` of them: no matrix is ever whole in memory.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import numpy as np

from exo_kimi.checkpoint.sources import ModuleSource
from exo_kimi.compress.convert.conversion import Conversion
from exo_kimi.compress.convert.encoding import encode
from exo_kimi.compress.convert.rows import SourceRows
from exo_kimi.compress.convert.targets import ModuleTarget, RowBlock
from exo_kimi.compress.output.shard_file import Progress, ShardFile
from exo_kimi.compress.output.shards import OutputShard
from exo_kimi.compress.output.writer import CheckpointWriter, Written
from exo_kimi.compress.ranges import RangeReader
from exo_kimi.errors import QuantizationError


def convert(conversion: Conversion, *, workers: int | None = None, progress: Progress | None = None) -> Written:
    """Write the output, or what an interrupted run left of it.

    Args:
        conversion: what to write.
        workers: threads; one for each processor that this process may use, when not given.
        progress: called with the bytes of each piece that is written.

    Raises:
        UsageError, MachineError: as `CheckpointWriter`.
        CheckpointError: the source cannot be read, or holds what is not finite.
    """
    threads = workers or processors()
    with (
        CheckpointWriter(conversion.job, progress) as writer,
        RangeReader(conversion.manifest.directory) as reader,
        ThreadPoolExecutor(threads, thread_name_prefix="convert") as pool,
    ):
        for shard in writer.missing():
            with writer.open(shard) as file:
                work: deque[Future[None]] = deque()
                try:
                    for task in _tasks(conversion, reader, shard, file):
                        if len(work) >= 2 * threads:
                            work.popleft().result()
                        work.append(pool.submit(task))
                    while work:
                        work.popleft().result()
                finally:
                    _settle(work)
        return writer.finish()


def processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _settle(work: deque[Future[None]]) -> None:
    """Let no block write into a file that is about to be closed."""
    for future in work:
        future.cancel()
    for future in work:
        with suppress(BaseException):  # the first failure is on its way already
            future.result()


def _tasks(
    conversion: Conversion, reader: RangeReader, shard: OutputShard, file: ShardFile
) -> Iterator[Callable[[], None]]:
    """Whatever fills one shard, in the order of the model."""
    names = {tensor.name for tensor in shard.tensors}
    for target in conversion.targets:
        if target.tensors[0].name in names:
            rows = SourceRows(reader, target.source)
            yield lambda source=target.source: _check_shapes(reader, source)  # type: ignore[misc]
            for block in target.blocks():
                yield _encoded(conversion, target, rows, block, file)
    for entry in conversion.carried:
        if entry.name in names:
            for at, data in reader.pieces(entry):
                yield lambda name=entry.name, at=at, data=data: file.put(name, data, at=at)  # type: ignore[misc]


def _encoded(
    conversion: Conversion, target: ModuleTarget, rows: SourceRows, block: RowBlock, file: ShardFile
) -> Callable[[], None]:
    def task() -> None:
        columns = conversion.importance_of(target, block.matrix)
        for piece in encode(target, rows, block, conversion.rounding, importance=columns):
            file.put(piece.name, piece.data, at=piece.at)

    return task


def _check_shapes(reader: RangeReader, source: ModuleSource) -> None:
    """compressed-tensors repeats the unpacked shapes as data: they must be the architecture's.

    Raises:
        QuantizationError: one is another.
    """
    for entry in source.parts.get("weight_shape", ()):
        found = reader.read(entry).view(np.int64 if entry.dtype == "I64" else np.int32).reshape(-1, 2)
        if not (found == source.spec.shape[-2:]).all():
            raise QuantizationError(
                entry.name, expected=source.spec.shape[-2:], found=found.tolist()[:3], where=entry.file
            )
