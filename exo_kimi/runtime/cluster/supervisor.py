"""The cluster of stages behind the Pipeline protocol: brought up, watched, and brought up again after a fault.

A fault ends an epoch: requests in flight are told, broken stages are started or connected anew, the others keep their
weights and caches and only end their sequences.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any, TypeVar

import zmq.asyncio

from exo_kimi.errors import (
    EngineStoppedError,
    ExoKimiError,
    RuntimeFault,
    StageDiedError,
    StageError,
    StageStalledError,
    UsageError,
)
from exo_kimi.runtime.cluster.capacity import check_weights_fit, disk_capacity, kv_capacity
from exo_kimi.runtime.cluster.child_process import socket_directory
from exo_kimi.runtime.cluster.cluster_plan import ClusterPlan
from exo_kimi.runtime.cluster.options import ClusterOptions, RunSettings
from exo_kimi.runtime.cluster.stage_handle import StageHandle
from exo_kimi.runtime.pipeline import DiskBlocks, Failed, PipelineEvent, PipelineInfo, Ready
from exo_kimi.runtime.prefix_key import unpack_keys
from exo_kimi.runtime.protocol.faults import LinkBroken
from exo_kimi.runtime.protocol.versions import Versions
from exo_kimi.runtime.requests import StageHealth
from exo_kimi.runtime.steps import Step, StepResult

__all__ = ["ClusterOptions", "StageCluster"]
logger = logging.getLogger(__name__)
GIVE_UP_AFTER = 5  # faults in a row without a served step: requests are refused from then on, trying goes on
FIRST_BACKOFF_S = 0.5
SLOW_RETRY_S = 10.0
LOOP_WELL_S = 60.0  # a loop that ran for so long may fail anew
CAUSE_WAIT_S = 0.5
Answer = TypeVar("Answer")
_TRANSIENT = (StageDiedError, StageStalledError, LinkBroken)


class StageCluster:
    """Stages in processes of their own, on this machine or others.

    Args:
        plan: who holds what (see `cluster_plan.make_plan`).
        options: how to run it.

    Raises:
        UsageError: a context that the model does not have.
    """

    def __init__(self, plan: ClusterPlan, options: ClusterOptions | None = None) -> None:
        self.plan = plan
        self.options = options or ClusterOptions()
        limit = plan.config.max_position_embeddings
        self._context_tokens = limit if self.options.context is None else self.options.context
        if not 1 <= self._context_tokens <= limit:
            raise UsageError(
                "the model has no such context",
                expected=f"1 to {limit} (max_position_embeddings)",
                found=self.options.context,
                where="--context",
            )
        self._events: asyncio.Queue[PipelineEvent | None] = asyncio.Queue()
        self._handles: list[StageHandle] = []
        self._info: PipelineInfo | None = None
        self._epoch = 0
        self._ready = False
        self._backoff = RestartBackoff()
        self._last_fault: RuntimeFault | None = None
        self._broken: StageError | None = None
        self._unanswered: dict[int, float] = {}
        self._idle_since_s: float | None = None
        self._closed = False
        self._tasks: list[asyncio.Task[None]] = []
        self._directory: Path | None = None

    @property
    def stages(self) -> int:
        """How many stages there are."""
        return len(self.plan.stages)

    def info(self) -> PipelineInfo | None:
        """The info of the last Ready; None before the first."""
        return self._info

    def health(self) -> tuple[StageHealth, ...]:
        """What each stage last said, stage 0 first."""
        return tuple(handle.health() for handle in self._handles)

    async def start(self) -> None:
        """Begin to bring the stages up, in the background."""
        self._directory = socket_directory()
        self._zmq = zmq.asyncio.Context()
        self._first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._fault: asyncio.Future[RuntimeFault] = asyncio.get_running_loop().create_future()
        settings = RunSettings(
            session=uuid.uuid4().hex,
            options=self.options,
            key=self.plan.key,
            versions=Versions.installed(),
            socket_directory=self._directory,
        )
        self._handles = [
            StageHandle(
                stage,
                settings,
                self._zmq,
                on_result=self._on_result,
                on_blocks=self._on_blocks,
                on_fault=self._on_fault,
            )
            for stage in self.plan.stages
        ]
        self._tasks = [asyncio.create_task(self._run(work)) for work in (self._supervise, self._watch)]

    async def wait_ready(self) -> None:
        """Wait until the stages are up for the first time.

        Raises:
            ExoKimiError: they cannot be brought up; nothing is tried any more.
        """
        await asyncio.shield(self._first)

    async def send(self, step: Step) -> None:
        """Put a step on its way.

        Raises:
            RuntimeFault: see `Pipeline.send`.
        """
        if self._closed:
            raise EngineStoppedError("the stages were stopped")
        if not self._ready or step.epoch != self._epoch:
            raise self._last_fault or StageError(
                "the stages are not ready", expected=f"epoch {self._epoch}", found=f"epoch {step.epoch}"
            )
        self._unanswered[step.step_id] = time.monotonic()
        await self._handles[0].send(step)

    async def receive(self) -> PipelineEvent:
        """Wait for the next event.

        Raises:
            EngineStoppedError: `close` was called.
            StageError: the supervisor failed; nothing is tried any more.
        """
        event = None if self._closed else await self._events.get()
        if event is None:
            raise self._broken or EngineStoppedError("the stages were stopped")
        return event

    async def close(self, *, keep_layers: bool = False) -> None:
        """Stop every stage; no process and no file is left behind.

        Args:
            keep_layers: leave remote stages without a goodbye: another cluster of this process comes for what they hold.
        """
        if self._closed:
            return
        self._closed = True
        self._ready = False
        self._events.put_nowait(None)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(each.disconnect() if keep_layers else each.close() for each in self._handles))
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
        if self._tasks:
            self._zmq.destroy(linger=0)
            if not self._first.done():
                self._first.set_exception(EngineStoppedError("the stages were stopped"))
            self._first.exception()  # nobody may be waiting

    async def _run(self, work: Callable[[], Awaitable[None]]) -> None:
        """One of the two loops. Without either requests would hang: what ends it is begun again, or else ends everything."""
        failures = 0
        while True:
            began_s = time.monotonic()
            try:
                return await work()
            except Exception as error:
                logger.exception("the supervisor failed")
                failures = 1 if time.monotonic() - began_s > LOOP_WELL_S else failures + 1
                if failures >= GIVE_UP_AFTER:
                    self._broken = StageError(f"the supervisor failed: {type(error).__name__}: {error}")
                    self._give_up(self._broken)
                    self._events.put_nowait(None)
                    return None
            await asyncio.sleep(FIRST_BACKOFF_S)

    async def _supervise(self) -> None:
        while True:
            self._fault = asyncio.get_running_loop().create_future()
            try:
                await self._bring_up()
                fault = await self._fault
            except ExoKimiError as error:
                if not self._first.done() and not isinstance(error, _TRANSIENT):
                    self._give_up(error)
                    return
                fault = error if isinstance(error, RuntimeFault) else StageError(str(error))
            except Exception as error:
                logger.exception("the stages could not be brought up")
                fault = StageError(f"the stages could not be brought up: {type(error).__name__}: {error}")
            self._backoff.on_fault()
            self._end_epoch(fault)
            if not self._first.done() and not self._backoff.requests_may_wait:
                self._give_up(fault)
                return
            await asyncio.sleep(self._backoff.pause_s)

    def _give_up(self, error: ExoKimiError) -> None:
        """Nothing is tried any more: this is for the user to mend."""
        fault = error if isinstance(error, RuntimeFault) else StageError(str(error))
        self._ready = False
        self._last_fault = fault
        self._events.put_nowait(Failed(error=fault, recovering=False))
        if not self._first.done():
            self._first.set_exception(error)
            self._first.exception()  # nobody may be waiting

    def _end_epoch(self, fault: RuntimeFault) -> None:
        self._ready = False
        self._last_fault = fault
        recovering = self._backoff.requests_may_wait
        logger.error("the stages failed (%s): %s", "restarting" if recovering else "trying on slowly", fault)
        self._events.put_nowait(Failed(error=fault, recovering=recovering))

    async def _bring_up(self) -> None:
        started_s = time.monotonic()
        for handle in self._handles:
            handle.check_socket()
        await asyncio.gather(*(handle.disconnect() for handle in self._handles if handle.broken))
        connected = await gather_or_cancel([handle.connect() for handle in self._handles], unless=self._fault)
        check_weights_fit([stage.memory() for stage in connected if stage.loaded is None])
        loaded = await gather_or_cancel([stage.load() for stage in connected], unless=self._fault)
        self._epoch += 1
        following = [handle.from_previous for handle in self._handles[1:]]
        joins = zip(connected, [*following, None], strict=True)
        cache_step = max(one.cache_step for one in loaded)
        joined = await gather_or_cancel(
            [stage.join(self._epoch, address, block_tokens=cache_step) for stage, address in joins],
            unless=self._fault,
        )
        capacity = kv_capacity(
            [stage.memory() for stage in connected],
            kv_bytes=self.options.kv_bytes,
            planned_kv_bytes=self.options.planned_kv_bytes,
        )
        disk = disk_capacity(joined)
        self._info = PipelineInfo(
            context=self._context_tokens,
            kv_capacity_tokens=capacity.tokens,
            state_tokens=capacity.state_tokens,
            recurrent=any(one.state_bytes for one in loaded),
            snapshot_tokens=capacity.snapshot_tokens,
            cache_step=cache_step,
            vocab_size=self.plan.config.vocab_size,
            kv_bytes_per_token=max(one.kv_bytes_per_token for one in loaded),
            disk_blocks=disk.blocks,
            snapshot_blocks=disk.snapshot_blocks,
        )
        self._ready = True
        self._unanswered.clear()
        logger.info("%d stages are ready after %.1f s", self.stages, time.monotonic() - started_s)
        blocks = tuple(unpack_keys(one.blocks) for one in joined)
        held = tuple(tuple(caches.held() for caches in one.kept) for one in joined)
        self._events.put_nowait(Ready(epoch=self._epoch, info=self._info, blocks=blocks, held=held))
        if not self._first.done():
            self._first.set_result(None)

    def _on_result(self, result: StepResult) -> None:
        if self._ready and result.epoch == self._epoch:
            self._unanswered.pop(result.step_id, None)
            self._backoff.reset()
            self._events.put_nowait(result)

    def _on_blocks(self, event: DiskBlocks) -> None:
        if self._ready and event.epoch == self._epoch:
            self._events.put_nowait(event)

    def _on_fault(self, fault: RuntimeFault, epoch: int | None) -> None:
        """What a stage reports unasked. A fault of an old epoch is old news."""
        if epoch is not None and not (self._ready and epoch == self._epoch):
            return
        self._ready = False
        if isinstance(fault, LinkBroken):
            asyncio.get_running_loop().call_later(CAUSE_WAIT_S, self._set_fault, fault, self._fault)
        else:
            self._set_fault(fault, self._fault)

    @staticmethod
    def _set_fault(fault: RuntimeFault, target: asyncio.Future[RuntimeFault]) -> None:
        if not target.done():
            target.set_result(fault)

    async def _watch(self) -> None:
        """Heartbeats out, silence noticed. If this loop itself was suspended, nobody else is to blame."""
        interval_s = min(self.options.heartbeat_s, self.options.stall_s / 4)
        while True:
            before_s = time.monotonic()
            await asyncio.sleep(interval_s)
            late_s = time.monotonic() - before_s - interval_s
            for handle in self._handles:
                if late_s > interval_s:
                    handle.extend_deadline(late_s)
                handle.check_deadlines()
                await handle.ping()
            self._check_steps(late_s if late_s > interval_s else 0.0)

    def _check_steps(self, gap_s: float) -> None:
        """A step that no stage works on and that is not answered was lost on its way.

        Stages tell what they do now and then: one may seem idle for a moment after the stage before it has worked for long. So it
        counts only that all of them were idle at every look since.

        Args:
            gap_s: for which this loop itself was suspended.
        """
        now_s = time.monotonic()
        if gap_s:
            self._unanswered = {step_id: sent_s + gap_s for step_id, sent_s in self._unanswered.items()}
        oldest_s = min(self._unanswered.values(), default=None)
        if gap_s or not self._ready or oldest_s is None or not all(handle.is_idle for handle in self._handles):
            self._idle_since_s = None
            return
        if self._idle_since_s is None:
            self._idle_since_s = now_s
        waited_s = now_s - max(oldest_s, self._idle_since_s)
        if waited_s > self.options.stall_s:
            # libzmq stops sending on a connection whose buffers the system refused once, and says nothing.
            for handle in self._handles:
                handle.drop_link()
            what = f"a step was lost on its way: no stage has worked on it for {waited_s:.1f} s"
            self._on_fault(StageStalledError(what, expected=f"an answer in {self.options.stall_s:g} s"), self._epoch)


class RestartBackoff:
    """Pauses between tries to bring the stages up: none at first, then doubling with every fault in a row."""

    def __init__(self) -> None:
        self._faults = 0

    @property
    def requests_may_wait(self) -> bool:
        """Whether requests may go on waiting."""
        return self._faults < GIVE_UP_AFTER

    @property
    def pause_s(self) -> float:
        """Seconds before the next try."""
        if not self.requests_may_wait:
            return SLOW_RETRY_S
        return 0.0 if self._faults <= 1 else FIRST_BACKOFF_S * 2.0 ** (self._faults - 2)

    def on_fault(self) -> None:
        """A fault happened."""
        self._faults += 1

    def reset(self) -> None:
        """A step was served."""
        self._faults = 0


async def gather_or_cancel(work: Iterable[Coroutine[Any, Any, Answer]], *, unless: asyncio.Future[Any]) -> list[Answer]:
    """Run coroutines at once; the first error ends the others, and so does an error in `unless`.

    Args:
        work: what to do.
        unless: a future that is done when all of it has become pointless; its result is an exception.

    Returns:
        What each returned.

    Raises:
        Exception: the first error, or the result of `unless`.
    """
    tasks = [asyncio.create_task(each) for each in work]
    waiting: set[asyncio.Future[Any]] = {*tasks}
    try:
        while waiting:
            done, _ = await asyncio.wait({*waiting, unless}, return_when=asyncio.FIRST_COMPLETED)
            if unless in done:
                raise unless.result()
            for task in done:
                task.result()
            waiting -= done
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
