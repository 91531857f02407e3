"""Experts of a checkpoint's files into slots: several reads at a time, each straight into the memory of a slot where the bytes
are those that it holds.

A read that fails or ends early raises an error that names the tensor. Files stay open from the start, so that one that is
deleted meanwhile is still read.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from exo_kimi.checkpoint.tensor_files import TensorFiles
from exo_kimi.errors import ExpertReadError
from exo_kimi.experts.convert import to_float32, unpack_fp8, words, write_biases, write_floats
from exo_kimi.experts.direct import DirectReader
from exo_kimi.experts.layout import ByteRange, LayerLayout, Leaf, ProjectionLayout, StoredPart

READERS = 8
"""Reads at a time: what the SSD of a Mac wants to be busy."""

READ_BYTES = 8 * 1024**2
"""Most bytes of one read: that often it is known that reading goes on."""

INLINE_BYTES = 256 * 1024
"""Less is read sooner by the thread that waits for it than by another."""

Preadv = Callable[[int, Sequence[memoryview], int], int]
SlotViews = Sequence[dict[str, memoryview]]
"""Writable bytes of one slot: for each projection, by the name of the leaf."""


@dataclass(slots=True)
class ReadCounters:
    """What was read since the start.

    Args:
        read_bytes: from files; of a read that failed, what came.
        reads: calls of the system.
        experts: that were put into slots whole.
        read_s: in which at least one read was under way.
        stall_s: in which somebody waited for one.
        failed: waits that ended with an error.
        prefetched_bytes: of `read_bytes`, what was read before anybody asked for it.
        prefetch_used_bytes: of these, what was asked for then.
        prefetch_wasted_bytes: of these, what was not.
    """

    read_bytes: int = 0
    reads: int = 0
    experts: int = 0
    read_s: float = 0.0
    stall_s: float = 0.0
    failed: int = 0
    prefetched_bytes: int = 0
    prefetch_used_bytes: int = 0
    prefetch_wasted_bytes: int = 0


@dataclass(frozen=True, slots=True)
class SlotOrder:
    """One expert of a layer, and the slot that it goes to.

    Args:
        layout: of the layer.
        expert: its number.
        views: writable bytes of the slot.
        prefetched: a read of it into other memory that began before; its bytes are copied.
    """

    layout: LayerLayout
    expert: int
    views: SlotViews
    prefetched: PrefetchedExpert | None = None


class ExpertStore:
    """Open files of one checkpoint directory.

    Args:
        directory: the checkpoint.
        preadv: reads; tests put faults here.
        readers: reads at a time.
        direct: read past the page cache, where the system can.
    """

    def __init__(
        self, directory: Path, *, preadv: Preadv = os.preadv, readers: int = READERS, direct: bool = False
    ) -> None:
        self.directory = directory
        self.counters = ReadCounters()
        self.on_progress: Callable[[], None] | None = None
        """Told after each read, in the thread that read."""
        self._preadv = preadv
        self._readers = readers
        self._files = TensorFiles(directory)
        self._direct = DirectReader(directory) if direct else None
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="expert")
        self._lock = threading.Lock()
        self._under_way, self._counted_s = 0, 0.0
        # Whoever lets go of the model lets go of its files; the threads end by themselves.
        weakref.finalize(self, self._files.close)
        if self._direct is not None:
            weakref.finalize(self, self._direct.close)

    @property
    def is_direct(self) -> bool:
        """Whether reads go past the page cache."""
        return self._direct is not None and self._direct.works

    def open(self, layout: LayerLayout) -> None:
        """Open the files that a layer's experts lie in.

        Raises:
            TensorFileError: one cannot be opened.
        """
        for expert in range(layout.experts):
            for part in layout.expert_bytes(expert):
                self._files.descriptor(part.entry)
                if self._direct is not None:
                    self._direct.open(part.entry.file)

    def begin(self, orders: Sequence[SlotOrder]) -> PendingRead:
        """Put reads on their way; few bytes are read when `wait` is called."""
        pending = PendingRead(self, len(orders), [order for order in orders if order.prefetched is not None])
        wanted = [order for order in orders if order.prefetched is None]
        tasks = [task for order in wanted for task in _tasks(order)]
        if sum(order.layout.disk_bytes for order in wanted) <= INLINE_BYTES:
            pending.inline = tasks
        else:
            pending.futures = [self._pool.submit(self._run, share) for share in _dealt(tasks, self._readers)]
        return pending

    def prefetch(self, order: SlotOrder, free: Callable[[], None]) -> PrefetchedExpert:
        """Read an expert that nobody has asked for, after whatever is under way.

        Args:
            order: it, and memory that is no slot.
            free: called once that memory is used no longer, in any thread.
        """
        futures = [self._pool.submit(self._run, [task]) for task in _tasks(order)]
        return PrefetchedExpert(self, order.views, futures, free)

    def count_prefetched(self, count: int, *, used: bool) -> None:
        """Take note of so many bytes that were read before anybody asked for them, and whether somebody did."""
        with self._lock:
            self.counters.prefetched_bytes += count
            if used:
                self.counters.prefetch_used_bytes += count
            else:
                self.counters.prefetch_wasted_bytes += count

    def _run(self, tasks: Sequence[_Task]) -> _Outcome:
        """Carry out tasks one after another; the first failure ends them and is returned."""
        outcome = _Outcome()
        self._count_time(1)
        try:
            for task in tasks:
                self._fill(task, outcome)
        except ExpertReadError as error:
            outcome.error = error
        finally:
            self._count_time(-1)
            with self._lock:
                self.counters.read_bytes += outcome.read_bytes
                self.counters.reads += outcome.reads
        return outcome

    def _count_time(self, more: int) -> None:
        """Reads begin or end: what passed since the last time counts if one was under way."""
        with self._lock:
            now_s = time.perf_counter()
            if self._under_way:
                self.counters.read_s += now_s - self._counted_s
            self._under_way, self._counted_s = self._under_way + more, now_s

    def _fill(self, task: _Task, outcome: _Outcome) -> None:
        views = task.views
        reads: list[tuple[ByteRange, memoryview]] = []
        staged: list[tuple[Leaf, bytearray, bytearray | None]] = []
        for leaf in task.projection.leaves:
            if leaf.is_copied and leaf.stored is not None:
                reads.append((leaf.stored.range_of(task.expert), views[leaf.name]))
            elif leaf.stored is not None:
                staged.append((leaf, _stage(leaf.stored, task.expert, reads), _stage(leaf.scale, task.expert, reads)))
        self._read(reads, outcome)
        for leaf, data, factors in staged:
            _convert(leaf, data, factors, views[leaf.name])
        for leaf in task.projection.leaves:
            if leaf.stored is None:
                write_biases(views["scales"], views[leaf.name], leaf.dtype, leaf.zero)

    def _read(self, reads: list[tuple[ByteRange, memoryview]], outcome: _Outcome) -> None:
        for run in _adjacent(reads):
            descriptor = self._files.descriptor(run[0][0].entry)
            position = run[0][0].start
            waiting = [view for _, view in run]
            while waiting:
                step = _first_bytes(waiting, READ_BYTES)
                try:
                    count = self._read_some(run[0][0].entry.file, descriptor, step, position)
                except OSError as failure:
                    raise self._failed(run, position, found=failure.strerror or str(failure)) from failure
                if count <= 0:
                    raise self._failed(run, position, found=f"the file ends at {position:,} bytes")
                outcome.read_bytes += count
                outcome.reads += 1
                position += count
                while waiting and count >= len(waiting[0]):
                    count -= len(waiting.pop(0))
                if waiting:
                    waiting[0] = waiting[0][count:]
                if self.on_progress is not None:
                    self.on_progress()

    def _read_some(self, file: str, descriptor: int, views: Sequence[memoryview], position: int) -> int:
        if self._direct is not None:
            count = self._direct.read(self._preadv, file, views, position)
            if count is not None:
                return count
        return self._preadv(descriptor, views, position)

    def _failed(self, run: Sequence[tuple[ByteRange, memoryview]], position: int, *, found: str) -> ExpertReadError:
        part = next(part for part, _ in run if position < part.end)
        return ExpertReadError(
            f"cannot read {part.entry.name}",
            expected=f"bytes {part.start:,} to {part.end:,}",
            found=found,
            where=self.directory / part.entry.file,
            fix="look at the disk; if the file was cut or replaced, copy it again and start anew",
        )


@dataclass(slots=True)
class PendingRead:
    """Reads under way; `wait` is called once, whatever happens."""

    store: ExpertStore
    experts: int
    prefetched: list[SlotOrder]
    futures: list[Future[_Outcome]] = field(default_factory=list)
    inline: list[_Task] = field(default_factory=list)

    def cancel(self) -> None:
        """Until nothing writes into a slot any more, whatever came of it."""
        for future in self.futures:
            future.cancel()
        for order in self.prefetched:
            if order.prefetched is not None:
                order.prefetched.drop()
        wait(self.futures)

    def wait(self) -> None:
        """Until nothing writes into a slot any more.

        Raises:
            ExpertReadError: a read failed; what its experts' slots hold means nothing.
        """
        counters, began_s = self.store.counters, time.perf_counter()
        late = [
            task
            for order in self.prefetched
            if order.prefetched is not None and not order.prefetched.copy_to(order.views)
            for task in _tasks(order)
        ]
        self.prefetched = []
        outcomes = [self.store._run(tasks) for tasks in (self.inline, late) if tasks]
        outcomes += [each.result() for each in self.futures]
        counters.stall_s += time.perf_counter() - began_s
        error = next((each.error for each in outcomes if each.error is not None), None)
        if error is not None:
            counters.failed += 1
            raise error
        counters.experts += self.experts


@dataclass(slots=True)
class PrefetchedExpert:
    """An expert on its way into memory that is no slot; what is called first, `copy_to` or `drop`, settles it."""

    store: ExpertStore
    views: SlotViews
    futures: list[Future[_Outcome]]
    free: Callable[[], None]
    settled: bool = False

    def copy_to(self, slot: SlotViews) -> bool:
        """Wait for the read and copy its bytes; False where it failed, and the expert is to be read as any other."""
        self.settled = True
        try:
            outcomes = [future.result() for future in self.futures]
            is_whole = all(outcome.error is None for outcome in outcomes)
            if is_whole:
                for here, there in zip(self.views, slot, strict=True):
                    for name, view in there.items():
                        np.copyto(np.frombuffer(view, np.uint8), np.frombuffer(here[name], np.uint8))
        finally:
            wait(self.futures)
            self.free()
        self.store.count_prefetched(sum(outcome.read_bytes for outcome in outcomes), used=is_whole)
        return is_whole

    def drop(self) -> None:
        """Nobody wants it: a read that has not begun never does, and another counts as wasted when it ends."""
        if not self.settled:
            self.settled = True
            left = _Countdown(len(self.futures), self.free)
            for future in self.futures:
                future.cancel()
                future.add_done_callback(partial(self._dropped, left))

    def _dropped(self, left: _Countdown, future: Future[_Outcome]) -> None:
        left.one_less()
        if not future.cancelled() and future.exception() is None:
            self.store.count_prefetched(future.result().read_bytes, used=False)


class _Countdown:
    """Calls a function once something has happened so often, in any threads."""

    def __init__(self, count: int, then: Callable[[], None]) -> None:
        self._count, self._then, self._lock = count, then, threading.Lock()

    def one_less(self) -> None:
        with self._lock:
            self._count -= 1
            is_last = self._count == 0
        if is_last:
            self._then()


@dataclass(frozen=True, slots=True)
class _Task:
    """One projection of one expert into one slot."""

    expert: int
    projection: ProjectionLayout
    views: dict[str, memoryview]


@dataclass(slots=True)
class _Outcome:
    read_bytes: int = 0
    reads: int = 0
    error: ExpertReadError | None = None


def _tasks(order: SlotOrder) -> list[_Task]:
    pairs = zip(order.layout.projections, order.views, strict=True)
    return [_Task(order.expert, projection, views) for projection, views in pairs]


def _dealt(tasks: Sequence[_Task], hands: int) -> Iterator[Sequence[_Task]]:
    for hand in range(min(hands, len(tasks))):
        yield tasks[hand::hands]


def _stage(part: StoredPart | None, expert: int, reads: list[tuple[ByteRange, memoryview]]) -> bytearray:
    """Memory beside the slot for bytes that are not those that it holds."""
    if part is None:
        return bytearray()
    data = bytearray(part.nbytes)
    reads.append((part.range_of(expert), memoryview(data)))
    return data


def _convert(leaf: Leaf, data: bytearray, factors: bytearray | None, destination: memoryview) -> None:
    stored = leaf.stored
    if stored is None:
        return
    if leaf.scale is not None and factors:
        scale = to_float32(words(factors, leaf.scale.dtype), leaf.scale.dtype).reshape(leaf.scale.shape)
        unpack_fp8(np.frombuffer(data, np.uint8).reshape(stored.shape), scale, destination, leaf.dtype)
    else:
        write_floats(to_float32(words(data, stored.dtype), stored.dtype), destination, leaf.dtype)


def _adjacent(reads: list[tuple[ByteRange, memoryview]]) -> Iterator[list[tuple[ByteRange, memoryview]]]:
    """Ranges in runs of bytes that follow each other in one file."""
    run: list[tuple[ByteRange, memoryview]] = []
    for part, view in sorted(reads, key=lambda read: (read[0].entry.file, read[0].start)):
        if run and (run[-1][0].entry.file, run[-1][0].end) != (part.entry.file, part.start):
            yield run
            run = []
        run.append((part, view))
    if run:
        yield run


def _first_bytes(views: Sequence[memoryview], most_bytes: int) -> list[memoryview]:
    taken: list[memoryview] = []
    for view in views:
        taken.append(view[:most_bytes])
        most_bytes -= len(taken[-1])
        if most_bytes <= 0:
            break
    return taken
