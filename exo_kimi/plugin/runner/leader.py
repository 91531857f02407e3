"""Rank 0's scheduler: our cluster of stages and our engine on an event loop in a thread of exo's runner.

Replies come out of a queue as exo's chunks, in order, each reply ended by `ENDED`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

import zmq.asyncio

from exo_kimi.arch.config import KimiConfig
from exo_kimi.checkpoint.drafts.manifest import DraftManifest
from exo_kimi.checkpoint.manifest import StageManifest
from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.errors import EngineStoppedError, ExoKimiError, RuntimeFault, StageError, StageUnreachableError
from exo_kimi.plugin.api.refusal import Refusal
from exo_kimi.plugin.runner.advice import advise
from exo_kimi.plugin.runner.assignment import NodeLayers
from exo_kimi.plugin.runner.chunks import ChunkWriter, ExoTypes
from exo_kimi.plugin.runner.events import RunnerEvents
from exo_kimi.plugin.runner.judge import HOPELESS_S, TICK_S, Judge
from exo_kimi.plugin.runner.options import EngineOptions
from exo_kimi.plugin.runner.rank_messages import RankMessagesListener
from exo_kimi.plugin.runner.task import prepare_task
from exo_kimi.runtime.cluster.cluster_plan import ClusterPlan, StagePlan
from exo_kimi.runtime.cluster.options import ClusterOptions
from exo_kimi.runtime.cluster.supervisor import StageCluster
from exo_kimi.runtime.engine.engine import Engine
from exo_kimi.runtime.engine.prefix_cache import PrefixOptions
from exo_kimi.runtime.engine.speculation import Drafter
from exo_kimi.runtime.protocol.messages import LinkKind, Load, encode_path
from exo_kimi.runtime.requests import GenerationRequest, SamplingParams, StageHealth
from exo_kimi.runtime.transport.address import Address
from exo_kimi.runtime.transport.keys import ClusterKey

logger = logging.getLogger(__name__)
ENDED = object()
READY_S = 120.0
RDMA_LINK: LinkKind = "jaccl"
_CLOSE_S = 2.0  # exo gives a runner three seconds
Result = TypeVar("Result")


def config_hash(config: KimiConfig) -> str:
    """What all nodes of an instance must have in common."""
    return hashlib.sha256(repr(config).encode()).hexdigest()


def cluster_plan(
    own: NodeLayers, manifest: StageManifest, stage: Address, key: ClusterKey, *, draft: DraftManifest | None = None
) -> ClusterPlan:
    """The stages as the runtime wants them. All of them have loaded already.

    Args:
        own: rank 0's layers, and where it reaches the others.
        manifest: of its layers.
        stage: where its own stage listens.
        key: the cluster's.
        draft: the draft head, which the last rank holds too.
    """
    directory, config = manifest.directory, manifest.config
    layers = () if draft is None else draft.config.feature_layers(config.num_hidden_layers)
    last = own.stages - 1
    stages = tuple(
        StagePlan(
            load=Load(
                stage=rank,
                directory=encode_path(directory),
                start_layer=start,
                end_layer=end,
                dtype=None,
                fingerprint=config_hash(config),
                feature_layers=layers,
                draft_directory=encode_path(draft.directory) if draft is not None and rank == last else None,
                draft_fingerprint=draft.fingerprint if draft is not None and rank == last else None,
            ),
            remote=remote,
            resident_bytes=0,
            from_previous=previous,
        )
        for rank, ((start, end), remote, previous) in enumerate(
            zip(own.ranges, (stage, *own.seen), (None, *own.from_previous), strict=True)
        )
    )
    return ClusterPlan(directory=directory, config=config, stages=stages, key=key)


@dataclass(frozen=True, slots=True)
class _Serving:
    """What replies need, once the stages work together."""

    engine: Engine
    speaker: Speaker


class Leader:
    """Runs replies.

    Args:
        own: rank 0's layers, and where the others reach it.
        key: the cluster's.
        types: exo's.
        events: takes how the stages are.
        options: limits of sequences and of caches.
    """

    def __init__(
        self,
        own: NodeLayers,
        *,
        key: ClusterKey,
        types: ExoTypes,
        events: RunnerEvents,
        options: EngineOptions | None = None,
    ) -> None:
        self.outputs: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self._own = own
        self._key = key
        self._types = types
        self._events = events
        self._options = options or EngineOptions()
        self._serving: _Serving | None = None
        self._drafter: Drafter | None = None
        self._tasks: dict[str, tuple[asyncio.Task[None], Any]] = {}  # with what exo's API calls it
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._context = zmq.asyncio.Context()
        self._exits = AsyncExitStack()
        self._exits.callback(self._context.destroy, linger=0)
        threading.Thread(target=self._loop.run_forever, name="exo-kimi-leader", daemon=True).start()
        self._ranks: RankMessagesListener | None = None  # alone, there is nobody to tell
        if own.listen is not None:
            self._ranks = self._wait(self._listen(own.listen), timeout_s=None)

    @property
    def engine(self) -> Engine:
        """Ours.

        Raises:
            StageError: the stages do not work together yet.
        """
        return self._require().engine

    def wait_connected(self, timeout_s: float = READY_S) -> None:
        """Wait until every other rank is there.

        Raises:
            StageUnreachableError: some did not come in time.
        """
        if self._ranks is not None:
            self._wait(self._ranks.wait_complete(timeout_s), timeout_s=None)

    def address_of(self, rank: int) -> Address:
        """Where a rank's stage listens, as it said itself.

        Raises:
            StageUnreachableError: it did not say.
        """
        found = None if self._ranks is None else self._ranks.stages.get(rank)
        if found is None:
            raise StageUnreachableError(f"rank {rank} did not say where its stage listens", stage=rank)
        return found

    def start(
        self, speaker: Speaker, plan: ClusterPlan, *, drafter: Drafter | None = None, timeout_s: float = READY_S
    ) -> None:
        """Bring the stages together and run a few tokens through them; `drafter` guesses, where there is a draft head.

        Raises:
            ExoKimiError: they do not come together.
        """
        try:
            self._drafter = drafter
            self._wait(self._start(speaker, plan), timeout_s=timeout_s)
        except TimeoutError:
            raise StageError("the stages did not become ready", expected=f"within {timeout_s:g} s") from None

    def submit(self, task_id: str, task: Any) -> None:
        """Begin the reply to exo's task; what goes wrong with it is one of its chunks."""
        self._loop.call_soon_threadsafe(self._begin, task_id, task)

    def cancel(self, task_id: str) -> None:
        """End a reply on every stage."""
        self._loop.call_soon_threadsafe(self._cancel, task_id)

    def close(self) -> None:
        """Stop the stages' work and the thread; idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            self._wait(self._exits.aclose(), timeout_s=_CLOSE_S)
        except (TimeoutError, ExoKimiError) as error:
            logger.warning("the stages did not end in time: %s", error)
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _wait(self, work: Coroutine[Any, Any, Result], *, timeout_s: float | None) -> Result:
        future: Future[Result] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(timeout_s)

    def _require(self) -> _Serving:
        if self._serving is None:
            raise StageError("the stages do not work together yet: exo warms an engine up before its first task")
        return self._serving

    async def _listen(self, listen: Address) -> RankMessagesListener:
        ranks = await RankMessagesListener.open(self._context, listen, ranks=self._own.stages, key=self._key)
        self._exits.callback(ranks.close)
        return ranks

    async def _start(self, speaker: Speaker, plan: ClusterPlan) -> None:
        wanted = (plan.config.max_position_embeddings, self._own.context, self._options.context)
        context = min(each for each in wanted if each is not None)
        engine = await self._bring_up(plan, context)
        request = GenerationRequest(
            request_id="warm-up",
            prompt_ids=tuple(speaker.tokenizer.encode("warm-up")) * 4,
            max_tokens=2,
            sampling=SamplingParams(temperature=0.0),
        )
        async with aclosing(engine.generate(request)) as events:
            async for _ in events:
                pass
        self._serving = _Serving(engine, speaker)
        if self._ranks is not None:
            self._ranks.send_ready()
        for work in (self._tell_progress(engine), self._judge(engine), self._end_if_broken(engine)):
            self._exits.callback(asyncio.create_task(work).cancel)

    async def _bring_up(self, plan: ClusterPlan, context: int) -> Engine:
        """An engine over the stages. Where exo's instance is on RDMA, hidden states go that way, or else over addresses."""
        device = self._own.rdma_device
        if device is not None:
            try:
                engine = await self._bring_up_over(RDMA_LINK, plan, context)
            except RuntimeFault as error:
                logger.warning("RDMA by %s is not to be had, so addresses it is: %s", device, error)
                self._events.explain(f"placed on RDMA, which could not be used: {error.what}")
            else:
                self._events.explain(f"hidden states over RDMA, {device}")
                return engine
        return await self._bring_up_over("zmq", plan, context)

    async def _bring_up_over(self, link: LinkKind, plan: ClusterPlan, context: int) -> Engine:
        cluster = StageCluster(plan, ClusterOptions(context=context, kv_bytes=self._options.kv_bytes, link=link))
        prefixes = PrefixOptions(memory_bytes=self._options.prefix_cache_bytes)
        engine = Engine(cluster, context=context, drafter=self._drafter, prefixes=prefixes, survive_s=HOPELESS_S)
        try:
            await cluster.start()
            await engine.start()
            await cluster.wait_ready()
            await engine.wait_ready()
        except BaseException:
            await cluster.close(keep_layers=True)  # they are loaded once only, and another link may do
            await engine.close()
            raise
        self._exits.push_async_callback(engine.close)
        return engine

    def _begin(self, task_id: str, task: Any) -> None:
        self._tasks[task_id] = (asyncio.create_task(self._run(task_id, task.task_params)), task.command_id)

    def _cancel(self, task_id: str) -> None:
        if (found := self._tasks.get(task_id)) is not None:
            found[0].cancel()

    async def _run(self, task_id: str, params: Any) -> None:
        try:
            await self._reply(task_id, params)
        except asyncio.CancelledError:
            logger.info("task %s was cancelled", task_id)
        except ExoKimiError as error:
            logger.warning("task %s failed: %s", task_id, advise(error))
            self._fail(task_id, error)
        except Exception as error:
            logger.exception("task %s failed", task_id)
            self._fail(task_id, error)
        finally:
            del self._tasks[task_id]
            self.outputs.put((task_id, ENDED))
            if self._ranks is not None:
                self._ranks.send_done([task_id])

    async def _reply(self, task_id: str, params: Any) -> None:
        serving = self._require()
        engine, speaker = serving.engine, serving.speaker
        context = engine.snapshot().context
        prepared = await asyncio.to_thread(prepare_task, task_id, params, speaker, context=context)
        prepared = prepared.checked(engine)
        for warning in prepared.warnings:
            logger.info("task %s: %s", task_id, warning)
        writer = ChunkWriter(
            self._types,
            self._own.model_id,
            prepared,
            speaker.tokenizer,
            peak_bytes=lambda: engine.pipeline.health()[0].peak_bytes,
        )
        (choice,) = prepared.choices
        async with aclosing(choice.generate(engine)) as steps:
            async for token, events in steps:
                for chunk in writer.write(token, events):
                    self.outputs.put((task_id, chunk))

    def _fail(self, task_id: str, error: Exception) -> None:
        chunk = self._types.ErrorChunk(model=self._own.model_id, error_message=Refusal.of(error).to_text())
        self.outputs.put((task_id, chunk))

    async def _judge(self, engine: Engine) -> None:
        """Whether the stages are together, with and without replies; if they are apart for good, this runner ends."""
        judge = Judge()
        while True:
            await asyncio.sleep(TICK_S)
            if self._ranks is not None:
                self._ranks.send_beat()
            snapshot = engine.snapshot()
            quietest = max(snapshot.stages, key=lambda stage: stage.silent_s)
            match judge.tick(connected=snapshot.ready, silent_s=quietest.silent_s):
                case "together":
                    self._events.release()
                case "apart":
                    away = next((stage for stage in snapshot.stages if stage.state != "ready"), quietest)
                    self._events.hold(_what_is_missing(away))
                case "hopeless":
                    error = StageError(
                        "the stages did not come together again",
                        expected=f"within {HOPELESS_S:g} s",
                        found="; ".join(_what_is_missing(stage) for stage in snapshot.stages if stage.state != "ready"),
                    )
                    self._events.end(advise(error), [command_id for _, command_id in self._tasks.values()])
                    return

    async def _end_if_broken(self, engine: Engine) -> None:
        """An engine that has failed for good would refuse every task of a runner that says it is ready."""
        try:
            await engine.wait_broken()
        except EngineStoppedError:
            return  # it was closed
        except RuntimeFault as error:
            self._events.end(advise(error), [command_id for _, command_id in self._tasks.values()])

    async def _tell_progress(self, engine: Engine) -> None:
        """Progress of long prompts, and what the caches hold."""
        told: dict[str, int] = {}
        held = 0
        while True:
            await asyncio.sleep(TICK_S)
            snapshot = engine.snapshot()
            sequences = max((stage.sequences for stage in snapshot.stages), default=0)
            if sequences != held:
                held = sequences
                kv_bytes = sum(stage.kv_bytes for stage in snapshot.stages)
                logger.info("the ranks hold %d sequences, %d bytes of caches", held, kv_bytes)
            prompts = {each.request_id: each for each in snapshot.requests if each.state == "prefill"}
            for task_id, each in prompts.items():
                if told.get(task_id) != each.prompt_done:
                    chunk = self._types.PrefillProgressChunk(
                        model=self._own.model_id,
                        processed_tokens=each.prompt_done,
                        total_tokens=each.prompt_tokens,
                    )
                    self.outputs.put((task_id, chunk))
            told = {task_id: each.prompt_done for task_id, each in prompts.items()}


def _what_is_missing(stage: StageHealth) -> str:
    said = f", {stage.last_error}" if stage.last_error is not None else ""
    return f"rank {stage.stage} ({stage.address}) is {stage.state}, silent for {stage.silent_s:.0f} s{said}"
