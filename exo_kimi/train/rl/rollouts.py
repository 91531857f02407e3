"""Rollouts by the project's own engine, on the weights that would be exported: batched, with the prompt of a group computed once.

A round is the same for the same weights and seeds: its prompts are computed first, all in one go, and its completions begin from
what is cached of them, so no step mixes prefill, whose chunks depend on the clock, with decoding. With several stages, who shares
a step depends on which stage was faster, and log-probabilities differ in their last bits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.runtime.cluster.cluster_plan import make_plan
from exo_kimi.runtime.cluster.options import ClusterOptions
from exo_kimi.runtime.cluster.supervisor import StageCluster
from exo_kimi.runtime.engine.engine import Engine
from exo_kimi.runtime.engine.prefix_cache import PrefixOptions
from exo_kimi.runtime.loading.loader import load
from exo_kimi.runtime.pipeline import Pipeline
from exo_kimi.runtime.requests import GenerationRequest, SamplingParams
from exo_kimi.runtime.stage.inline import InlinePipeline
from exo_kimi.train.rl.recipe import TEMPERATURE

_TOGETHER = 256
"""Completions that are drawn at a time."""
_PREFILL_CHUNK = 16384  # all prompts of a round in one step


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What the engine drew.

    Args:
        ids: token ids, the one that ended it among them.
        logprobs: of each, by the weights that drew it.
        cached_tokens: of its prompt, which were not computed for it.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRequest:
    """A prompt and the seeds of its completions."""

    prompt_ids: tuple[int, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSampler:
    """Draws completions from a checkpoint.

    Args:
        directory: the checkpoint.
        stop_ids: tokens that end a completion.
        max_completion_length: tokens of one at most.
        stages: 1 computes in this process, more in as many processes.
    """

    directory: Path
    stop_ids: frozenset[int]
    max_completion_length: int
    stages: int = 1

    def draw(self, requests: Sequence[RolloutRequest]) -> list[list[Completion]]:
        """The completions of each request, in the order of its seeds.

        Raises:
            CheckpointError: the checkpoint cannot be read.
            RuntimeFault: a stage failed.
        """
        return asyncio.run(self._draw(requests))

    async def _draw(self, requests: Sequence[RolloutRequest]) -> list[list[Completion]]:
        names = count()
        context = max(len(request.prompt_ids) for request in requests) + self.max_completion_length + 1
        pipeline = await self._pipeline(context)
        drawn: list[list[Completion]] = []
        async with Engine(
            pipeline,
            context=context,
            prefill_chunk=_PREFILL_CHUNK,
            max_running=_TOGETHER,
            queue_limit=_TOGETHER,
            prefixes=PrefixOptions(),
        ) as engine:
            await engine.wait_ready()
            most = max(1, _TOGETHER // max(len(request.seeds) for request in requests))
            for start in range(0, len(requests), most):
                together = requests[start : start + most]
                await asyncio.gather(*[self._one(engine, next(names), each, 0, 1) for each in together])
                found = await asyncio.gather(
                    *[
                        self._one(engine, next(names), each, seed, self.max_completion_length)
                        for each in together
                        for seed in each.seeds
                    ]
                )
                coming = iter(found)
                drawn += [[next(coming) for _ in each.seeds] for each in together]
        return drawn

    async def _pipeline(self, context: int) -> Pipeline:
        if self.stages > 1:
            plan = make_plan(Checkpoint(self.directory), stages=self.stages, dtype="float32")
            cluster = StageCluster(plan, ClusterOptions(context=context))
            await cluster.start()
            return cluster
        return InlinePipeline(
            lambda: [load(self.directory, dtype="float32", fuse=True)],
            stages=1,
            context=context,
            kv_capacity_tokens=2 * _TOGETHER * context,
            cache_step=1,  # a prompt of a few tokens is worth sharing
        )

    async def _one(self, engine: Engine, name: int, request: RolloutRequest, seed: int, most: int) -> Completion:
        ids: list[int] = []
        logprobs: list[float] = []
        cached = 0
        asked = GenerationRequest(
            request_id=f"rollout-{name}",
            prompt_ids=request.prompt_ids,
            max_tokens=most,
            sampling=SamplingParams(temperature=TEMPERATURE, seed=seed, logprobs=True),
            stop_ids=self.stop_ids,
        )
        async with aclosing(engine.generate(asked)) as events:
            async for event in events:
                ids.append(event.token_id)
                logprobs.append(event.logprob or 0.0)
                cached = event.cached_tokens
        return Completion(ids=tuple(ids), logprobs=tuple(logprobs), cached_tokens=cached)
