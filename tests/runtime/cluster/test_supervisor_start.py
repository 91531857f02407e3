"""The supervisor while nothing is ready yet: its own loops, and what it says of stages that are only just starting."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

import pytest

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import StageError
from exo_kimi.runtime.cluster import child_process, supervisor
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


def test_empty_directories_of_servers_that_were_killed_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_process.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(child_process, "_MAX_DIRECTORY_CHARACTERS", 1000)
    old_s = time.time() - child_process.LEFT_S - 60
    names = ["exo-kimi-aaaaaaaa", "exo-kimi-in_use00", "exo-kimi-new00000", "exo-kimi-mine", "photos"]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / "exo-kimi-in_use00" / "0-1").touch()
    (tmp_path / "exo-kimi-link0000").symlink_to(tmp_path / "photos")
    for name in (*names[:2], *names[3:]):
        os.utime(tmp_path / name, (old_s, old_s))
    made = child_process.socket_directory()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*names[1:], "exo-kimi-link0000", made.name}
