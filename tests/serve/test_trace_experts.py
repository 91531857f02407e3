"""`serve --trace-experts`: what a running server asked its experts for, replayed to the very counts that it had."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import resolve
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import UsageError
from exo_kimi.experts.layout import layouts_of
from exo_kimi.experts.traces.replay import replay
from exo_kimi.experts.traces.trace import read_traces
from exo_kimi.runtime.requests import GenerationRequest, SamplingParams
from exo_kimi.serve import launch
from exo_kimi.serve.launch import ServeOptions, serve


def served_with(monkeypatch: pytest.MonkeyPatch, options: ServeOptions, use: Callable[[Any], Awaitable[None]]) -> None:
    async def start(factory: Callable[[], Awaitable[Any]]) -> None:
        served = await factory()
        try:
            await asyncio.wait_for(served.engine.wait_ready(), 60)
            await use(served.engine)
        finally:
            await served.engine.close()

    monkeypatch.setattr(launch, "run", lambda factory, **_: asyncio.run(start(factory)))
    serve(options)


def test_its_trace_replays_to_its_own_counters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_tiny(tmp_path / "tiny", seed=5)
    layouts = layouts_of(resolve(open_index(directory)).sources, floats="F32")
    slots, prompt, count = 3, (5, 9, 200, 31, 7, 7, 2), 6
    budget = slots * sum(layout.slot_bytes for layout in layouts.values())
    options = ServeOptions(
        directory=directory,
        stages=2,
        dtype="float32",
        expert_cache=budget,
        speculate="off",
        trace_experts=tmp_path / "chat.trace",
    )
    found: list[Any] = []

    async def use(engine: Any) -> None:
        request = GenerationRequest(
            request_id="one", prompt_ids=prompt, max_tokens=count, sampling=SamplingParams(temperature=0.0)
        )
        tokens = [event.token_id async for event in engine.generate(request)]
        found.append(len(tokens))
        trace = read_traces([tmp_path / f"chat.stage-{stage}.trace" for stage in (0, 1)])
        made = replay(trace, "lru", slots)
        async with asyncio.timeout(60):  # until heartbeats have told all of it
            while counted(engine) != (made.hits, made.misses):
                await asyncio.sleep(0.1)
        found.append(trace)

    served_with(monkeypatch, options, use)
    tokens, trace = found
    assert trace.tokens == len(prompt) + tokens - 1
    assert trace.calls.tolist() == [len(prompt), *[1] * (tokens - 1)]
    assert set(trace.layers) == set(layouts)


def counted(engine: Any) -> tuple[int, int]:
    experts = [stage.experts for stage in engine.snapshot().stages if stage.experts is not None]
    return sum(each.hits for each in experts), sum(each.misses for each in experts)


def test_a_place_that_cannot_be_written_is_refused_before_anything_starts(tmp_path: Path) -> None:
    options = ServeOptions(directory=make_tiny(tmp_path / "tiny"), trace_experts=tmp_path / "none" / "t.trace")
    with pytest.raises(UsageError, match="the trace cannot be written"):
        serve(options)
