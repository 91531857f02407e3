"""A Pipeline whose stages all run in one thread of this process: the oracle of the tests, and one machine's small server.

Hidden states pass between stages as the same bytes that a link would carry.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue

from exo_kimi.errors import EngineStoppedError, StageError
from exo_kimi.runtime.pipeline import DiskBlocks, Failed, PipelineEvent, PipelineInfo, Ready
from exo_kimi.runtime.requests import ExpertHealth, StageHealth, StageState
from exo_kimi.runtime.stage.caches import has_states
from exo_kimi.runtime.stage.drafting import DraftRunner
from exo_kimi.runtime.stage.pictures import PictureTower
from exo_kimi.runtime.stage.prefix_disk import Changed, PrefixDisk
from exo_kimi.runtime.stage.stage_model import StageModel, expert_health
from exo_kimi.runtime.stage.worker import StageWorker, as_fault
from exo_kimi.runtime.steps import HeldCaches, Step, StepResult

logger = logging.getLogger(__name__)
Post = Callable[[PipelineEvent], None]
OpenDisk = Callable[[int, StageModel, Changed], PrefixDisk]
"""Makes the disk of a stage, from its index, its model and what to tell of changes."""


class InlinePipeline:
    """Stages in a thread.

    Args:
        load: makes the models of all stages, in order; called in the thread, for MLX's streams belong to threads.
        stages: how many models `load` makes.
        context: most positions of one sequence.
        kv_capacity_tokens: cached tokens of all sequences together.
        cache_step: tokens by which a cache grows.
        open_disk: called in the thread for each stage; None keeps nothing on disk.
        load_tower: makes the tower of the first stage, in the thread; None takes no pictures.
        ahead: see `StageWorker`.
        feature_layers: see `StageWorker`.
        load_drafts: makes the draft head of the last stage, in the thread, from that stage's model; None has none.
        state_tokens, snapshot_tokens: see `PipelineInfo`.
        load_adapted: makes a stage's model with each adapter, by name, in the thread, from the one without; None has none.
    """

    def __init__(
        self,
        load: Callable[[], Sequence[StageModel]],
        *,
        stages: int,
        context: int,
        kv_capacity_tokens: int,
        cache_step: int,
        open_disk: OpenDisk | None = None,
        load_tower: Callable[[], PictureTower] | None = None,
        ahead: bool = True,
        feature_layers: Sequence[int] = (),
        load_drafts: Callable[[StageModel], DraftRunner] | None = None,
        state_tokens: int = 0,
        snapshot_tokens: int = 0,
        load_adapted: Callable[[StageModel], Mapping[str, StageModel]] | None = None,
    ) -> None:
        self._load = load
        self._state_tokens, self._snapshot_tokens = state_tokens, snapshot_tokens
        self._feature_layers = tuple(feature_layers)
        self._load_drafts = load_drafts
        self._load_adapted = load_adapted
        self._stages = stages
        self._context = context
        self._kv_capacity_tokens = kv_capacity_tokens
        self._cache_step = cache_step
        self._open_disk = open_disk
        self._load_tower = load_tower
        self._ahead = ahead
        self._info: PipelineInfo | None = None
        self._epoch = 0
        self._closed = False
        self._health: tuple[StageHealth, ...] = ()
        self._steps: SimpleQueue[Step | None] = SimpleQueue()
        self._events: asyncio.Queue[PipelineEvent | None] = asyncio.Queue()
        self._thread: threading.Thread | None = None

    @property
    def stages(self) -> int:
        """How many stages there are."""
        return self._stages

    def info(self) -> PipelineInfo | None:
        """The info of the last Ready; None before the first."""
        return self._info

    def health(self) -> tuple[StageHealth, ...]:
        """What each stage held after the last step."""
        return self._health

    async def send(self, step: Step) -> None:
        """Queue a step for the thread."""
        if self._closed:
            raise EngineStoppedError("the stages were stopped")
        if self._info is None or step.epoch != self._epoch:
            raise StageError("the stages are not ready", expected=f"epoch {self._epoch}", found=f"epoch {step.epoch}")
        self._steps.put(step)

    async def receive(self) -> PipelineEvent:
        """Wait for the next event; the first call starts the thread."""
        if self._thread is None and not self._closed:
            post = functools.partial(_post, asyncio.get_running_loop(), self._events)
            self._thread = threading.Thread(target=self._work, args=(post,), name="inline-stages", daemon=True)
            self._thread.start()
        event = None if self._closed else await self._events.get()
        if event is None:
            raise EngineStoppedError("the stages were stopped")
        return event

    async def close(self) -> None:
        """Stop the thread after the step that it is in."""
        self._closed = True
        self._steps.put(None)
        self._events.put_nowait(None)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def _work(self, post: Post) -> None:
        """Run every step; the body of the thread."""
        workers: list[StageWorker] = []
        try:
            workers = [
                StageWorker(
                    model,
                    epoch=self._epoch,
                    stage=stage,
                    ahead=self._ahead,
                    feature_layers=self._feature_layers,
                    adapted=None if self._load_adapted is None else self._load_adapted(model),
                )
                for stage, model in enumerate(self._load())
            ]
            if self._load_tower is not None and workers:
                workers[0].tower = self._load_tower()
            if self._load_drafts is not None and workers:
                workers[-1].drafts = self._load_drafts(workers[-1].model)
            if len(workers) != self._stages:
                raise StageError("the loader made another number of stages", expected=self._stages, found=len(workers))
        except Exception as error:
            logger.exception("the stages could not be loaded")
            post(Failed(error=as_fault(error, stage=None), recovering=False))
            return
        disks = self._open_disks(workers, post)
        info = PipelineInfo(
            context=self._context,
            kv_capacity_tokens=self._kv_capacity_tokens,
            cache_step=self._cache_step,
            vocab_size=workers[0].model.args.vocab_size,
            state_tokens=self._state_tokens,
            recurrent=any(has_states(worker.model.make_cache()) for worker in workers),
            snapshot_tokens=self._snapshot_tokens,
            disk_blocks=min((disk.capacity_blocks for disk in disks), default=0),
            snapshot_blocks=max(
                (-(-disk.capacity_blocks // max(1, disk.capacity_snapshots)) for disk in disks), default=1
            ),
        )
        self._ready(workers, info, post)
        while (step := self._steps.get()) is not None and not self._closed:
            if step.epoch != self._epoch:
                continue
            try:
                result = run_chain(workers, step)
                self._look(workers, "ready")
                post(result)
                workers[-1].run_ahead()
            except Exception as error:
                fault = as_fault(error, stage=None)
                logger.warning("a step failed: %s", fault, exc_info=not isinstance(error, type(fault)))
                self._epoch += 1
                held = tuple(worker.keep(self._epoch) for worker in workers)
                post(Failed(error=fault))
                self._ready(workers, info, post, held)
        for disk in disks:
            disk.close()

    def _open_disks(self, workers: list[StageWorker], post: Post) -> list[PrefixDisk]:
        if self._open_disk is None:
            return []

        def changed(stage: int, added: tuple[str, ...], gone: tuple[str, ...]) -> None:
            post(DiskBlocks(epoch=self._epoch, stage=stage, added=added, gone=gone))

        for stage, worker in enumerate(workers):
            worker.disk = self._open_disk(stage, worker.model, functools.partial(changed, stage))
        return [worker.disk for worker in workers if worker.disk is not None]

    def _ready(
        self,
        workers: list[StageWorker],
        info: PipelineInfo,
        post: Post,
        held: tuple[tuple[HeldCaches, ...], ...] = (),
    ) -> None:
        self._info = info
        self._look(workers, "ready")
        blocks = tuple(worker.disk.keys() if worker.disk is not None else () for worker in workers)
        post(Ready(epoch=self._epoch, info=info, blocks=blocks, held=held))

    def _look(self, workers: list[StageWorker], state: StageState) -> None:
        self._health = tuple(
            StageHealth(
                stage=index,
                address="inline",
                state=state,
                start_layer=worker.model.start_layer,
                end_layer=worker.model.end_layer,
                kv_bytes=worker.kv_nbytes,
                sequences=worker.sequences,
                experts=_expert_health(worker.model),
            )
            for index, worker in enumerate(workers)
        )


def _expert_health(model: StageModel) -> ExpertHealth | None:
    streamed = getattr(model, "streamed", None)  # of a Model; the tests' fakes have none
    return None if streamed is None else expert_health(streamed)


def _post(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[PipelineEvent | None], event: PipelineEvent) -> None:
    # A loop that is gone has nobody who waits.
    if not loop.is_closed():
        loop.call_soon_threadsafe(events.put_nowait, event)


def run_chain(workers: Sequence[StageWorker], step: Step) -> StepResult:
    """Carry out a step on every stage in order.

    Raises:
        RuntimeFault: a stage failed, or the last one is not the last of the model.
    """
    moving: Step | StepResult = step
    for worker in workers:
        if isinstance(moving, StepResult):
            raise StageError("a stage before the last one answered the step", stage=worker.stage)
        moving = worker.execute(moving)
    if not isinstance(moving, StepResult):
        raise StageError("the last stage does not own the head of the model", stage=len(workers) - 1)
    return moving
