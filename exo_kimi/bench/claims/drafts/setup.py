"""A checkpoint with a draft head or without, all stages in one thread, and prompts answered by it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from exo_kimi.bench.claims.drafts.scripted_head import ScriptedHead
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.drafts.manifest import resolve_draft
from exo_kimi.runtime.engine.engine import Engine
from exo_kimi.runtime.engine.speculation import Drafter
from exo_kimi.runtime.loading.draft import load_draft_head
from exo_kimi.runtime.loading.loader import load
from exo_kimi.runtime.requests import EngineSnapshot, GenerationRequest, SamplingParams
from exo_kimi.runtime.stage.drafting import DraftRunner
from exo_kimi.runtime.stage.inline import InlinePipeline
from exo_kimi.runtime.stage.stage_model import StageModel

NEW = 96


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedAnswers:
    """Answers, and the time from the first token of the last one to its end."""

    answers: tuple[tuple[int, ...], ...]
    decode_s: float
    snapshot: EngineSnapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftedSetup:
    """A checkpoint, split, with a head or without.

    Args:
        checkpoint: of the model.
        bounds: of the stages.
        head: of its directory; None for none.
        script: what the head guesses, see `ScriptedHead`; None for its own guesses.
        chance: see `ScriptedHead`.
    """

    checkpoint: Path
    bounds: tuple[int, ...]
    head: Path | None = None
    script: tuple[int, ...] | None = None
    chance: float = 1.0

    def pipeline(self) -> InlinePipeline:
        """All stages in one thread."""
        layers = () if self.head is None else resolve_draft(self.head).config.feature_layers(self.bounds[-1])

        def stages() -> Sequence[StageModel]:
            return [load(self.checkpoint, a, b, dtype="float32", fuse=True) for a, b in pairwise(self.bounds)]

        def drafts(model: StageModel) -> DraftRunner:
            if self.head is None:
                raise ValueError("no head to load")
            head = load_draft_head(self.head, Checkpoint(self.checkpoint), dtype="float32")
            vocab_size = model.args.vocab_size
            if self.script is None:
                return DraftRunner(head, vocab_size=vocab_size)
            return DraftRunner(ScriptedHead(head, self.script, chance=self.chance), vocab_size=vocab_size)

        return InlinePipeline(
            stages,
            stages=len(self.bounds) - 1,
            context=4096,
            kv_capacity_tokens=16384,
            cache_step=256,
            feature_layers=layers,
            load_drafts=drafts if layers else None,
        )

    def decode(
        self,
        prompts: Sequence[tuple[int, ...]],
        drafter: Drafter | None,
        *,
        stop: frozenset[int] = frozenset(),
        new: int = NEW,
    ) -> TimedAnswers:
        """Answer prompts one after the other, greedily."""

        async def run() -> TimedAnswers:
            answers, begun_s = [], 0.0
            async with Engine(self.pipeline(), drafter=drafter, prefill_chunk=512) as engine:
                for index, prompt in enumerate(prompts):
                    request = GenerationRequest(
                        request_id=str(index),
                        prompt_ids=prompt,
                        max_tokens=new,
                        sampling=SamplingParams(temperature=0.0),
                        stop_ids=stop,
                    )
                    answer: list[int] = []
                    async with aclosing(engine.generate(request)) as events:
                        async for event in events:
                            begun_s = begun_s if answer else time.perf_counter()
                            answer.append(event.token_id)
                    answers.append(tuple(answer))
                taken_s = time.perf_counter() - begun_s
                return TimedAnswers(answers=tuple(answers), decode_s=taken_s, snapshot=engine.snapshot())

        return asyncio.run(run())
