"""Three stage processes and an engine: an answer goes on after a fault, from what the processes' caches and disks still hold."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import StageStalledError
from exo_kimi.models.kimi_k2 import CACHE_STEP
from exo_kimi.runtime.cluster.cluster_plan import make_plan
from exo_kimi.runtime.cluster.supervisor import ClusterOptions, StageCluster
from exo_kimi.runtime.engine.engine import Engine
from exo_kimi.runtime.engine.prefix_cache import PrefixOptions
from exo_kimi.runtime.requests import GenerationRequest, SamplingParams

pytestmark = pytest.mark.timeout(180)
PROMPT = tuple(range(2 * CACHE_STEP + 40))


async def ask(engine: Engine, *, then: asyncio.Event | None = None) -> list[int]:
    """24 tokens; `then` is set after the eighth."""
    request = GenerationRequest(
        request_id="", prompt_ids=PROMPT, max_tokens=24, sampling=SamplingParams(temperature=1.0, seed=5)
    )
    found: list[int] = []
    async for event in engine.generate(request):
        found.append(event.token_id)
        if then is not None and len(found) == 8:
            then.set()
    return found


async def test_an_answer_goes_on_from_the_disks_after_a_kill_and_from_memory_where_all_stages_live(
    tmp_path: Path,
) -> None:
    tiny = make_tiny(tmp_path / "tiny", dtype="F32")
    options = ClusterOptions(
        stall_s=30.0,
        child_command=(sys.executable, "-m", "exo_kimi.runtime.stage"),
        prefix_disk_bytes=10**9,
        prefix_directory=tmp_path / "prefixes",
    )
    cluster = StageCluster(make_plan(Checkpoint(tiny), stages=3, dtype="float32"), options)
    await cluster.start()
    async with Engine(cluster, prefixes=PrefixOptions(), survive_s=120) as engine:
        await engine.wait_ready()
        right = await ask(engine)
        while engine.snapshot().disk_blocks < 2:
            await asyncio.sleep(0.05)

        def kill() -> None:
            os.kill(cluster.health()[1].pid or 0, signal.SIGKILL)

        def lose_a_step() -> None:
            for handle in cluster._handles:
                handle.drop_link()
            cluster._on_fault(StageStalledError("a step was lost on its way"), cluster._epoch)

        resumed = []
        for fault in (kill, lose_a_step):
            before, begun = engine.snapshot(), asyncio.Event()
            task = asyncio.create_task(ask(engine, then=begun))
            await begun.wait()
            fault()
            assert await task == right
            after = engine.snapshot()
            assert after.requests_resumed_total == before.requests_resumed_total + 1
            resumed.append(after.resumed_tokens_total - before.resumed_tokens_total)
        assert resumed[0] == 2 * CACHE_STEP, "one stage holds what its disk has, and so all begin there"
        assert resumed[1] >= len(PROMPT) + 7, "all hold the prompt and the tokens after it"
        assert [stage.restarts for stage in cluster.health()] == [0, 1, 0]
