"""A Pipeline that says what a script says: the engine's own scheduling and guessing, counted at any model's size.

It computes nothing, so that bytes of a model of 1T parameters can be counted for a text of thousands of tokens in a second.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from exo_kimi.errors import EngineStoppedError
from exo_kimi.runtime.pipeline import PipelineEvent, PipelineInfo, Ready
from exo_kimi.runtime.requests import StageHealth
from exo_kimi.runtime.steps import Sampled, Segment, Step, StepResult

PLENTY = 1 << 20


class ReplayPipeline:
    """One stage whose model always goes on with the script.

    Args:
        script: token ids of a prompt and what follows it; every request's prompt is the begin of it.
        vocab_size: ids are below it.
    """

    stages = 1

    def __init__(self, script: Sequence[int], *, vocab_size: int) -> None:
        self.script = script
        self._info = PipelineInfo(context=PLENTY, kv_capacity_tokens=PLENTY, cache_step=1, vocab_size=vocab_size)
        self._events: asyncio.Queue[PipelineEvent | None] = asyncio.Queue()
        self._events.put_nowait(Ready(epoch=0, info=self._info))

    def info(self) -> PipelineInfo | None:
        """What it can hold."""
        return self._info

    def health(self) -> tuple[StageHealth, ...]:
        """Nothing to tell."""
        return ()

    async def send(self, step: Step) -> None:
        """Answer a step."""
        sampled: list[Sampled] = []
        row = 0
        for segment in step.segments:
            tokens = step.tokens[row : row + segment.length].tolist()
            row += segment.length
            if segment.sample:
                sampled += self._answer(segment, tokens)
        self._events.put_nowait(StepResult(epoch=step.epoch, step_id=step.step_id, sampled=tuple(sampled)))

    async def receive(self) -> PipelineEvent:
        """The next answer."""
        event = await self._events.get()
        if event is None:
            raise EngineStoppedError("the replay is over")
        return event

    async def close(self) -> None:
        """End."""
        self._events.put_nowait(None)

    def _answer(self, segment: Segment, tokens: list[int]) -> list[Sampled]:
        found: list[Sampled] = []
        for known in range(segment.length - segment.drafts, segment.length + 1):
            found.append(Sampled(seq_id=segment.seq_id, token_id=self.script[segment.offset + known]))
            if known < segment.length and found[-1].token_id != tokens[known]:
                break
        return found
