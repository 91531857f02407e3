"""The thread of a stage process that does its MLX work: one order after another, by a backend, and the status that both
threads share.

Orders come from the IO thread through a queue; answers go back through a callback. What fails is answered, never fatal.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from queue import Empty, SimpleQueue
from typing import Protocol

from exo_kimi.errors import CheckpointError, ExoKimiError, UsageError, machine_error
from exo_kimi.runtime.prefix_key import pack_keys
from exo_kimi.runtime.protocol.faults import to_message
from exo_kimi.runtime.protocol.frames import Message
from exo_kimi.runtime.protocol.messages import (
    BlocksChanged,
    ExpertTotals,
    HelloAck,
    Join,
    Joined,
    KeptCaches,
    Load,
    Loaded,
    Progress,
)
from exo_kimi.runtime.protocol.versions import Versions
from exo_kimi.runtime.requests import ExpertHealth, StageState
from exo_kimi.runtime.reserve import host_free_bytes
from exo_kimi.runtime.stage.memory import FreeMemory
from exo_kimi.runtime.stage.prefix_disk import Changed, OpenedDisk
from exo_kimi.runtime.stage.worker import as_fault
from exo_kimi.runtime.steps import NO_EPOCH, HeldCaches, Step, StepResult
from exo_kimi.units import format_gb, format_seconds

logger = logging.getLogger(__name__)
LOOK_AFTER_S = 0.05
LOOK_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class DropSequences:
    """Another leader comes: free the caches, keep the weights."""


@dataclass(frozen=True, slots=True)
class Unload:
    """The leader left: free everything."""


Order = Load | Join | Step | DropSequences | Unload | None


@dataclass(slots=True)
class StageStatus:
    """What a stage tells of itself. `newest_epoch` is written by the IO thread, the rest by the compute thread.
    `busy_since_s` is when the current order was begun or, while loading, last made progress (monotonic); None when idle."""

    free: FreeMemory
    state: StageState = "starting"
    epoch: int = NO_EPOCH
    newest_epoch: int = NO_EPOCH
    busy_since_s: float | None = None
    loaded_bytes: int = 0
    total_bytes: int = 0
    kv_bytes: int = 0
    active_bytes: int = 0
    peak_bytes: int = 0
    sequences: int = 0
    expert_cache_bytes: int | None = None
    experts: ExpertHealth | None = None
    compute_s: float = 0.0

    def hello_ack(self, versions: Versions) -> HelloAck:
        """The answer to a Hello."""
        free = self.free
        if free.scope == "host":
            free = FreeMemory(free_bytes=host_free_bytes(), scope="host")  # others came and went since
        return HelloAck(
            exo_kimi=versions.exo_kimi,
            mlx=versions.mlx,
            mlx_lm=versions.mlx_lm,
            pid=os.getpid(),
            host=socket.gethostname(),
            held_bytes=self.active_bytes,
            free_bytes=free.free_bytes,
            free_scope=free.scope,
            expert_cache_bytes=self.expert_cache_bytes,
        )

    def progress(self) -> Progress:
        """A heartbeat."""
        busy_since_s = self.busy_since_s
        return Progress(
            state=self.state,
            epoch=self.epoch,
            busy_s=0.0 if busy_since_s is None else max(0.0, time.monotonic() - busy_since_s),
            compute_s=self.compute_s,
            loaded_bytes=self.loaded_bytes,
            total_bytes=self.total_bytes,
            kv_bytes=self.kv_bytes,
            active_bytes=self.active_bytes,
            peak_bytes=self.peak_bytes,
            sequences=self.sequences,
            pid=os.getpid(),
            experts=None if self.experts is None else ExpertTotals(**asdict(self.experts)),
        )


class Backend(Protocol):
    """The work of one stage, for one thread: the one that made it, for MLX's streams belong to threads."""

    def load(self, order: Load, progress: Callable[[int, int], None]) -> Loaded:
        """Hold these layers and no others; `progress` gets (done, total) bytes."""
        ...

    def warm_up(self, after: Callable[[int], None]) -> int:
        """Run what the first request would be the first to run; `after` gets the number of passes that are done.

        Returns:
            How many there were.
        """
        ...

    def unload(self) -> None:
        """Give all memory back."""
        ...

    def reset(self, epoch: int, *, keep: bool = False) -> tuple[HeldCaches, ...]:
        """End every sequence and take the steps of an epoch.

        Args:
            epoch: of the steps to come.
            keep: keep what is whole of their caches.

        Returns:
            What was kept.
        """
        ...

    def open_disk(self, order: Join, changed: Changed) -> OpenedDisk:
        """Keep prefixes on disk as an order says, or none.

        Returns:
            For what there is room, and what is there.
        """
        ...

    def execute(self, step: Step) -> Step | StepResult:
        """Run a step."""
        ...

    def run_ahead(self) -> None:
        """The answer is on its way: begin with what will be asked next, if that is known."""
        ...

    def held(self) -> tuple[int, int]:
        """Bytes of all caches, and how many sequences there are."""
        ...

    def memory(self) -> tuple[int, int]:
        """Bytes in use, and the most since the process started."""
        ...

    def free(self) -> FreeMemory:
        """What could still be allocated."""
        ...

    def experts(self) -> ExpertHealth | None:
        """How the experts fare that stay on disk; None where all are held."""
        ...

    def tell_progress(self, progress: Callable[[], None]) -> None:
        """Have `progress` called, by any thread, whenever a step that reads from disk has read something."""
        ...


class StageCompute:
    """Carries out orders.

    Args:
        backend: does the work; made in the thread that calls `run`.
        status: kept up to date for heartbeats.
        post: takes every answer; called in this thread.
    """

    def __init__(self, backend: Backend, status: StageStatus, post: Callable[[Message], None]) -> None:
        self._backend = backend
        self._status = status
        self._post = post
        self._broken_epoch = -1
        self._looked_s = 0.0
        self._unseen = False
        self._busy_lock = threading.Lock()
        backend.tell_progress(self._on_progress)

    def run(self, orders: SimpleQueue[Order]) -> None:
        """Work until the order is None."""
        while (order := self._next(orders)) is not None:
            started_s = self._status.busy_since_s = time.monotonic()
            try:
                self._carry_out(order)
            except Exception as error:
                cause = error.__cause__ if isinstance(error, ExoKimiError) else error
                told = cause is not None and machine_error(cause) is not None  # where in our code is no news
                logger.error("%s failed: %s", type(order).__name__, error, exc_info=None if told else cause)
                self._answer_fault(order, error)
            finally:
                self._unseen = True
                if isinstance(order, Step):
                    self._status.compute_s += time.monotonic() - started_s
                # Looking takes time that the answer's way out and the next step would wait for.
                if not isinstance(order, Step) or time.monotonic() - self._looked_s > LOOK_EVERY_S:
                    self._look()
                with self._busy_lock:
                    self._status.busy_since_s = None

    def _on_progress(self) -> None:
        """A step is as alive as the disk that it reads from, however slow that is. A read that nobody waits for may end after
        its step, and makes no idle stage busy."""
        with self._busy_lock:
            if self._status.busy_since_s is not None:
                self._status.busy_since_s = time.monotonic()

    def _next(self, orders: SimpleQueue[Order]) -> Order:
        """The next order. While none comes, the memory is looked at."""
        if self._unseen:
            try:
                return orders.get(timeout=LOOK_AFTER_S)
            except Empty:
                self._look()
        return orders.get()

    def _carry_out(self, order: Order) -> None:
        if isinstance(order, Step):
            # After a failure nothing of its epoch is in order; before a join that waits, nothing is worth its time.
            if order.epoch == self._broken_epoch or order.epoch != self._status.newest_epoch:
                return
            self._post(self._backend.execute(order))
            self._backend.run_ahead()
        elif isinstance(order, Load):
            self._load(order)
        elif isinstance(order, Join):
            held = self._backend.reset(order.epoch, keep=order.keep)
            self._status.epoch = order.epoch
            disk = self._backend.open_disk(order, self._tell_blocks)
            self._status.state = "ready"
            free = self._status.free = self._backend.free()
            joined = Joined(
                epoch=order.epoch,
                kept=tuple(KeptCaches(**asdict(each)) for each in held),
                kept_bytes=self._backend.held()[0] if held else 0,
                free_bytes=free.free_bytes,
                free_scope=free.scope,
                disk_blocks=disk.blocks,
                disk_snapshots=disk.snapshots,
                blocks=pack_keys(disk.keys),
            )
            self._post(joined)
        elif isinstance(order, DropSequences):
            if self._status.state == "ready":
                self._backend.reset(NO_EPOCH)
                self._status.epoch = NO_EPOCH
        elif isinstance(order, Unload):
            self._backend.unload()
            self._status.state = "starting"
            self._status.loaded_bytes = self._status.total_bytes = 0
            self._status.free = self._backend.free()

    def _tell_blocks(self, added: tuple[str, ...], gone: tuple[str, ...]) -> None:
        self._post(BlocksChanged(epoch=self._status.epoch, added=pack_keys(added), gone=pack_keys(gone)))

    def _load(self, order: Load) -> None:
        status = self._status
        status.state = "loading"
        started_s = time.monotonic()
        read_bytes = 0

        def progress(done_bytes: int, total_bytes: int) -> None:
            nonlocal read_bytes
            read_bytes = done_bytes
            if done_bytes != status.loaded_bytes:
                status.busy_since_s = time.monotonic()
            status.loaded_bytes, status.total_bytes = done_bytes, total_bytes

        loaded = self._backend.load(order, progress)
        speed = read_at(read_bytes, time.monotonic() - started_s)
        logger.info("stage %d holds layers %d:%d, %s", order.stage, order.start_layer, order.end_layer, speed)
        self._warm_up(order.stage)
        self._post(loaded)

    def _warm_up(self, stage: int) -> None:
        status, started_s = self._status, time.monotonic()

        def after(passes: int) -> None:
            status.state, status.busy_since_s = "warming", time.monotonic()

        passes = self._backend.warm_up(after)
        status.state = "loading"  # until a leader says to which epoch it belongs
        if passes:
            logger.info(
                "stage %d is warm: %d passes in %s", stage, passes, format_seconds(time.monotonic() - started_s)
            )

    def _answer_fault(self, order: Order, error: Exception) -> None:
        epoch = order.epoch if isinstance(order, Step | Join) else self._status.newest_epoch
        if isinstance(order, Step):
            self._broken_epoch = epoch
        known = error if isinstance(error, CheckpointError | UsageError) else as_fault(error, stage=_stage(order))
        self._post(to_message(known, epoch, order.step_id if isinstance(order, Step) else None))

    def _look(self) -> None:
        self._looked_s, self._unseen = time.monotonic(), False
        status = self._status
        status.kv_bytes, status.sequences = self._backend.held()
        status.active_bytes, status.peak_bytes = self._backend.memory()
        status.experts = self._backend.experts()


def _stage(order: Order) -> int | None:
    return order.stage if isinstance(order, Load) else None


def read_at(read_bytes: int, taken_s: float) -> str:
    """How fast a stage was loaded, as a log line says it."""
    if not read_bytes:
        return "which it held already"
    speed = read_bytes / max(taken_s, 1e-3) / 1e9
    return f"{format_gb(read_bytes)} in {format_seconds(taken_s)}, {speed:.1f} GB/s"
