"""The supervisor while nothing is ready yet: its own loops, and what it says of stages that are only just starting."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import StageError
from exo_kimi.runtime.cluster import supervisor
from exo_kimi.runtime.cluster.cluster_plan import make_plan
from exo_kimi.runtime.cluster.supervisor import ClusterOptions, StageCluster
from exo_kimi.runtime.pipeline import Failed

SILENT = (sys.executable, "-c", "import time; time.sleep(60)")


@pytest.mark.parametrize("loop", ["_watch", "_supervise"])
async def test_a_bug_that_ends_a_loop_again_and_again_ends_what_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, loop: str
) -> None:
    async def broken(_: StageCluster) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(StageCluster, loop, broken)
    monkeypatch.setattr(supervisor, "FIRST_BACKOFF_S", 0.01)
    cluster = StageCluster(make_plan(Checkpoint(make_tiny(tmp_path / "tiny"))), ClusterOptions(child_command=SILENT))
    await cluster.start()
    try:
        async with asyncio.timeout(30):
            event = await cluster.receive()
            with pytest.raises(StageError):
                await cluster.wait_ready()
            with pytest.raises(StageError, match="the supervisor failed: ZeroDivisionError: a bug"):
                await cluster.receive()
    finally:
        await cluster.close()
    assert isinstance(event, Failed)
    assert not event.recovering
    assert "a bug" in caplog.text


async def test_a_stage_whose_process_is_being_started_is_not_called_dead(tmp_path: Path) -> None:
    cluster = StageCluster(make_plan(Checkpoint(make_tiny(tmp_path / "tiny"))), ClusterOptions(child_command=SILENT))
    await cluster.start()
    try:
        for _ in range(20):
            assert {stage.state for stage in cluster.health()} == {"starting"}
            await asyncio.sleep(0.01)
    finally:
        await cluster.close()
