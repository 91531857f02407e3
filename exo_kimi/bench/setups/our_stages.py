"""Our engine over stage processes of this machine, for a bench that is not asynchronous."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from exo_kimi.bench.setups.traffic import TokenTimes, Traffic
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.runtime.cluster.cluster_plan import make_plan
from exo_kimi.runtime.cluster.supervisor import ClusterOptions, StageCluster
from exo_kimi.runtime.engine.engine import Engine
from exo_kimi.runtime.requests import GenerationRequest, SamplingParams


class OurStages:
    """A running engine; made by `started`."""

    def __init__(self, runner: asyncio.Runner, engine: Engine) -> None:
        self._runner = runner
        self._engine = engine
        self._requests = 0

    @classmethod
    @contextlib.contextmanager
    def started(cls, checkpoint: Path, *, stages: int, context: int) -> Iterator[OurStages]:
        """The stages with a checkpoint, in fp32; every process ends with the context.

        Args:
            checkpoint: a directory.
            stages: how many; the layers are dealt out as `serve --stages` deals them.
            context: most positions of a sequence.
        """
        with asyncio.Runner() as runner:
            engine = runner.run(_start(checkpoint, stages, context))
            try:
                yield cls(runner, engine)
            finally:
                runner.run(engine.close())

    def run(self, traffic: Traffic) -> TokenTimes:
        """Greedy answers to all requests of a traffic."""
        return self._runner.run(self._run(traffic))

    async def _run(self, traffic: Traffic) -> TokenTimes:
        started_s = time.perf_counter()
        count = len(traffic.prompts)
        seen = TokenTimes(tokens=[[] for _ in range(count)], times=[[] for _ in range(count)], submitted=[0.0] * count)
        first_has = [asyncio.Event() for _ in range(max(traffic.new_tokens) + 1)]
        first_has[0].set()

        async def one(index: int) -> None:
            await first_has[traffic.after[index]].wait()
            seen.submitted[index] = time.perf_counter() - started_s
            self._requests += 1
            request = GenerationRequest(
                request_id=f"bench-{self._requests}",
                prompt_ids=traffic.prompts[index],
                max_tokens=traffic.new_tokens[index],
                sampling=SamplingParams(temperature=0.0),
            )
            async for event in self._engine.generate(request):
                seen.tokens[index].append(event.token_id)
                seen.times[index].append(time.perf_counter() - started_s)
                if index == 0:
                    first_has[len(seen.tokens[0])].set()

        async with asyncio.TaskGroup() as group:
            for index in range(count):
                group.create_task(one(index))
        return seen


async def _start(checkpoint: Path, stages: int, context: int) -> Engine:
    cluster = StageCluster(
        make_plan(Checkpoint(checkpoint), stages=stages, dtype="float32"), ClusterOptions(context=context)
    )
    engine = Engine(cluster, context=context)
    await cluster.start()
    await engine.start()
    try:
        await engine.wait_ready()
    except BaseException:
        await engine.close()
        raise
    return engine
