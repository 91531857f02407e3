"""Fakes of the stages: pure Python, and strict about what an engine may ask of real ones."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from exo_kimi.errors import EngineStoppedError, RuntimeFault, StageError
from exo_kimi.runtime.pipeline import Failed, PipelineEvent, PipelineInfo, Ready
from exo_kimi.runtime.prefix_key import block_keys
from exo_kimi.runtime.requests import StageHealth
from exo_kimi.runtime.steps import Blocks, Sampled, Segment, Step, StepResult

VOCAB_SIZE = 1000


def next_token(tokens: Sequence[int]) -> int:
    """The fake model: a token that depends on every token before it."""
    return zlib.crc32(" ".join(map(str, tokens)).encode()) % VOCAB_SIZE


def repeating_token(tokens: Sequence[int]) -> int:
    """Another fake model, which goes round in circles and leaves them now and then."""
    return zlib.crc32(f"{tokens[-2:]} {len(tokens) % 13 == 0}".encode()) % 6


def generation(prompt: Sequence[int], count: int, model: Callable[[Sequence[int]], int] = next_token) -> list[int]:
    """What a fake model generates after a prompt."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(model(tokens))
    return tokens[len(prompt) :]


@dataclass
class FakeStages:
    """All stages at once, in order, with real stages' refusals as assertions."""

    info: PipelineInfo
    model: Callable[[Sequence[int]], int] = next_token
    held: dict[int, list[int]] = field(default_factory=dict)
    prompts: dict[int, int] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    guesses: dict[int, int] = field(default_factory=dict)
    disk: dict[str, list[int]] = field(default_factory=dict)
    """Blocks by key; what a test takes away is not restored."""

    def execute(self, step: Step) -> StepResult:
        self.steps.append(step)
        for seq_id in step.free:
            assert seq_id in self.held, "freed a sequence that is not held"
            del self.held[seq_id]
        for start in step.begin:
            assert start.seq_id not in self.held
            source = self.held[start.source] if start.source is not None else []
            assert start.restore <= len(source), "begins with more than its source has"
            self.held[start.seq_id] = source[: start.restore]
            if start.move and start.source is not None:
                del self.held[start.source]
            self.prompts[start.seq_id] = start.prompt_tokens
        for key in step.drop:
            self.disk.pop(key, None)
        restored = tuple((blocks.seq_id, self._restore(blocks)) for blocks in step.restore)
        assert len({s.seq_id for s in step.segments}) == len(step.segments)
        sampled, row = [], 0
        for segment in step.segments:
            tokens = self.held[segment.seq_id]
            assert len(tokens) - self.guesses.get(segment.seq_id, 0) <= segment.offset <= len(tokens)
            assert segment.length >= 1 + segment.drafts
            del tokens[segment.offset :]
            tokens.extend(step.tokens[row : row + segment.length].tolist())
            row += segment.length
            self.guesses[segment.seq_id] = segment.drafts
            assert segment.sample or not segment.drafts
            if segment.sample:
                sampled += self.answer(segment, tokens)
        assert row == len(step.tokens)
        assert self.kv_tokens <= self.info.kv_capacity_tokens, "more KV than the stages have"
        for blocks in step.store:
            for index, key in enumerate(blocks.keys):
                start = blocks.offset + index * blocks.block_tokens
                tokens = self.held[blocks.seq_id][: start + blocks.block_tokens]
                assert key == block_keys(tokens, blocks.block_tokens)[-1], "a key for other tokens"
                self.disk[key] = tokens[start:]
        return StepResult(epoch=step.epoch, step_id=step.step_id, sampled=tuple(sampled), restored=restored)

    def _restore(self, blocks: Blocks) -> int:
        held = self.held[blocks.seq_id]
        for key in blocks.keys if len(held) == blocks.offset else ():
            if key not in self.disk:
                break
            held.extend(self.disk[key])
        return len(held)

    def answer(self, segment: Segment, tokens: list[int]) -> list[Sampled]:
        assert segment.mask is None or not segment.drafts
        found = []
        for end in range(len(tokens) - segment.drafts, len(tokens) + 1):
            found.append(Sampled(seq_id=segment.seq_id, token_id=self.model(tokens[:end])))
            if end < len(tokens) and found[-1].token_id != tokens[end]:
                break
        return found

    @property
    def kv_tokens(self) -> int:
        step = self.info.cache_step
        return sum(-(-len(tokens) // step) * step for tokens in self.held.values())


class FakePipeline:
    """A Pipeline over FakeStages; results come at once, or by `release` while `gated`."""

    def __init__(
        self,
        *,
        stages: int = 2,
        context: int = 10_000,
        kv_capacity_tokens: int = 100_000,
        cache_step: int = 16,
        gated: bool = False,
        ready: bool = True,
        model: Callable[[Sequence[int]], int] = next_token,
    ) -> None:
        self.stages = stages
        self._info = PipelineInfo(
            context=context, kv_capacity_tokens=kv_capacity_tokens, cache_step=cache_step, vocab_size=VOCAB_SIZE
        )
        self.gated = gated
        self.epoch = 0
        self.up = False
        self.closed = False
        self.most_in_flight = 0
        self.sent = self.refused = 0
        self._unanswered: list[StepResult] = []
        self._events: asyncio.Queue[PipelineEvent | None] = asyncio.Queue()
        self.model = model
        self.fake = FakeStages(self._info, model)
        if ready:
            self.recover()

    def info(self) -> PipelineInfo | None:
        return self._info

    def health(self) -> tuple[StageHealth, ...]:
        return tuple(
            StageHealth(stage=i, address="fake", state="ready", start_layer=i, end_layer=i + 1)
            for i in range(self.stages)
        )

    async def send(self, step: Step) -> None:
        if not self.up or step.epoch != self.epoch:
            self.refused += 1
            raise StageError("not ready")
        self.sent += 1
        self._unanswered.append(self.fake.execute(step))
        self.most_in_flight = max(self.most_in_flight, len(self._unanswered))
        assert len(self._unanswered) <= self.stages
        if not self.gated:
            asyncio.get_running_loop().call_soon(self.release)

    async def receive(self) -> PipelineEvent:
        event = await self._events.get()
        if event is None:
            raise EngineStoppedError("closed")
        return event

    async def close(self) -> None:
        self.closed = True
        self._events.put_nowait(None)

    def release(self, count: int = 1) -> None:
        """Answer the oldest steps."""
        for _ in range(min(count, len(self._unanswered))):
            self._events.put_nowait(self._unanswered.pop(0))

    def fail(self, error: RuntimeFault, *, recovering: bool = True) -> None:
        """Lose everything."""
        self.up = False
        self._unanswered.clear()
        self._events.put_nowait(Failed(error=error, recovering=recovering))

    def recover(self, info: PipelineInfo | None = None) -> None:
        """Come back, empty."""
        self.up = True
        self.epoch += 1
        self._info = info or self._info
        self.fake = FakeStages(self._info, self.model)
        self._events.put_nowait(Ready(epoch=self.epoch, info=self._info))


@pytest.fixture
def fakes() -> SimpleNamespace:
    """Fakes and their oracle, for tests that cannot import a sibling file."""
    return SimpleNamespace(
        Pipeline=FakePipeline,
        Stages=FakeStages,
        generation=generation,
        next_token=next_token,
        repeating_token=repeating_token,
        vocab_size=VOCAB_SIZE,
    )
