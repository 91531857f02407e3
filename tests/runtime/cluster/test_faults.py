"""Whatever the machine refuses while stages start, the supervisor goes on trying and serves when it may."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytest_asyncio
import zmq
import zmq.asyncio

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import StageDiedError, StageError, StageStalledError
from exo_kimi.runtime.cluster import stage_handle, supervisor
from exo_kimi.runtime.cluster.cluster_plan import make_plan
from exo_kimi.runtime.cluster.supervisor import ClusterOptions, StageCluster
from exo_kimi.runtime.pipeline import Failed, Ready
from exo_kimi.runtime.steps import Segment, Step, StepResult

pytestmark = pytest.mark.asyncio(loop_scope="module")
LIGHT = "import sys; from exo_kimi.models.mlx_lm_package import skip_mlx_lm_init; skip_mlx_lm_init()\n"
FAKE_CODE = LIGHT + Path(__file__).with_name("fake_stage.py").read_text()
FAKE = (sys.executable, "-c", FAKE_CODE)
# The first link to the next stage meets a machine without descriptors.
NO_LINK = """
import zmq
from exo_kimi.runtime.stage import server
connect, tries = server.connect, []
async def refused_once(*arguments, **options):
    if not tries:
        tries.append(1)
        raise zmq.ZMQError(24)
    return await connect(*arguments, **options)
server.connect = refused_once
"""
OPTIONS = ClusterOptions(stall_s=3.0, heartbeat_s=0.25, child_command=FAKE)
HARMLESS = 8


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("faults") / "tiny")


def cluster_of(tiny: Path, options: ClusterOptions = OPTIONS, *, stages: int = 1) -> StageCluster:
    return StageCluster(make_plan(Checkpoint(tiny), stages=stages), options)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tiny: Path) -> AsyncIterator[StageCluster]:
    one = cluster_of(tiny)
    await one.start()
    try:
        await one.wait_ready()
        yield one
    finally:
        await one.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(supervisor, "SLOW_RETRY_S", 0.05)


async def epoch_of(one: StageCluster) -> int:
    """The epoch in which it is ready, after all that was pending."""
    async with asyncio.timeout(30):
        while not one._events.empty() or not one._ready:
            await one.receive()
    return one._epoch


async def serves(one: StageCluster) -> bool:
    segment = Segment(seq_id=1, offset=0, length=1, sample=True)
    step = Step(epoch=await epoch_of(one), step_id=1, segments=(segment,), tokens=np.array([HARMLESS], np.int32))
    await one.send(step)
    return isinstance(await asyncio.wait_for(one.receive(), 30), StepResult)


def refuse(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, errors: Sequence[Exception]) -> list[Exception]:
    """Have a function fail with these errors, one a call, before it works again; returns those that it failed with so far."""
    real: Callable[..., object] = getattr(owner, name)
    failed: list[Exception] = []

    def refusing(*arguments: object, **options: object) -> object:
        if len(failed) < len(errors):
            failed.append(errors[len(failed)])
            raise failed[-1]
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, refusing)
    return failed


async def faults_of_a_restart(one: StageCluster) -> list[str]:
    """What is told between the death of a stage and the moment when all are ready again."""
    await epoch_of(one)
    (pid,) = [stage.pid for stage in one.health()]
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    faults: list[str] = []
    async with asyncio.timeout(60):
        while not isinstance(found := await one.receive(), Ready):
            assert isinstance(found, Failed)
            faults.append(str(found.error))
    return faults


async def test_stages_that_cannot_be_started_come_back_when_the_machine_allows_it(
    cluster: StageCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = [
        OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
        RuntimeError("can't start new thread"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        MemoryError(),
        OSError(errno.EAGAIN, "no process is left"),
        KeyError("a bug"),
    ]
    assert len(errors) >= supervisor.GIVE_UP_AFTER, "also after requests were refused"
    failed = refuse(monkeypatch, stage_handle.ChildProcess, "start", errors)
    faults = await faults_of_a_restart(cluster)
    assert failed == errors
    for words in ("Too many open files", "start new thread", "No space left", "no memory", "no process", "a bug"):
        assert any(words in fault for fault in faults), words
    assert await serves(cluster)


async def test_what_fails_after_a_stage_was_started_is_tried_again_too(
    cluster: StageCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = zmq.ZMQError(errno.EMFILE)
    all_failed = [
        refuse(monkeypatch, zmq.asyncio.Context, "socket", [error]),
        refuse(monkeypatch, stage_handle, "StageClient", [ZeroDivisionError("a bug")]),
        refuse(monkeypatch, supervisor, "kv_capacity", [MemoryError()]),
    ]
    faults = await faults_of_a_restart(cluster)
    assert [len(failed) for failed in all_failed] == [1, 1, 1]
    for words in (str(error), "a bug", "MemoryError"):
        assert any(words in fault for fault in faults), words
    assert await serves(cluster)


async def test_a_deleted_folder_of_sockets_is_made_again(cluster: StageCluster) -> None:
    await epoch_of(cluster)
    directory = cluster._directory
    assert directory is not None
    shutil.rmtree(directory)
    cluster._on_fault(StageError("as if a step had failed"), None)
    assert await serves(cluster)
    assert [path.is_socket() for path in directory.iterdir()] == [True]
    assert directory.stat().st_mode & 0o777 == 0o700


async def test_a_machine_that_never_allows_it_is_one_clear_error(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, asyncio, "create_subprocess_exec", [OSError(errno.EAGAIN, "Try again")] * 1000)
    one = cluster_of(tiny)
    await one.start()
    try:
        with pytest.raises(StageDiedError, match=r"(?s)stage 0 could not be started.*Try again.*ulimit -u"):
            await asyncio.wait_for(one.wait_ready(), 10)
    finally:
        await one.close()


async def test_a_stage_that_cannot_reach_the_next_one_says_so_and_is_asked_again(tiny: Path) -> None:
    command = (sys.executable, "-c", FAKE_CODE.replace("import os\n", NO_LINK + "import os\n", 1))
    one = cluster_of(tiny, ClusterOptions(stall_s=3.0, heartbeat_s=0.25, child_command=command), stages=2)
    await one.start()
    try:
        await asyncio.wait_for(one.wait_ready(), 30)
        assert isinstance(found := await one.receive(), Failed)
        assert "Too many open files" in str(found.error)
        assert await serves(one)
        assert [stage.restarts for stage in one.health()] == [0, 0]
    finally:
        await one.close()


@pytest.mark.parametrize("lost", ["step", "question"])
async def test_what_is_lost_on_its_way_to_a_stage_that_lives_is_told_and_the_stage_linked_anew(
    cluster: StageCluster, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """As after a refused `send`: libzmq sends nothing on that connection any more, and goes on receiving."""
    epoch = await epoch_of(cluster)
    client = cluster._handles[0]._client
    assert client is not None
    before = [stage.pid for stage in cluster.health()]
    monkeypatch.setattr(client._link, "send", lambda _: None)
    if lost == "step":
        segment = Segment(seq_id=1, offset=0, length=1, sample=True)
        await cluster.send(Step(epoch=epoch, step_id=1, segments=(segment,), tokens=np.array([HARMLESS], np.int32)))
    else:
        monkeypatch.setattr(stage_handle, "CONNECT_NEXT_S", 1 - 2 * OPTIONS.stall_s)
        cluster._on_fault(StageError("as if a step had failed"), None)
    faults: list[StageError | StageStalledError] = []
    async with asyncio.timeout(30):
        while not isinstance(found := await cluster.receive(), Ready):
            assert isinstance(found, Failed)
            faults.append(found.error)
    assert isinstance(faults[-1], StageStalledError)
    assert await serves(cluster)
    if lost == "step":
        assert "a step was lost on its way" in str(faults[0])
        assert [stage.pid for stage in cluster.health()] == before, "it is linked anew and keeps its weights"
    else:
        assert "stage 0 lives and does not answer" in str(faults[-1])
        assert [stage.pid for stage in cluster.health()] != before


async def test_a_step_that_stages_have_worked_on_for_long_is_not_lost_between_two_of_them(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one has said that it is done, the other not yet that it has begun: as with slow disks and long chunks."""

    class Stage:
        is_idle = True

        def drop_link(self) -> None:
            pass

    cluster, now_s, stages, faults = cluster_of(tiny, stages=2), 1000.0, [Stage(), Stage()], []
    monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=lambda: now_s))
    monkeypatch.setattr(cluster, "_ready", True)
    monkeypatch.setattr(cluster, "_handles", stages)
    monkeypatch.setattr(cluster, "_on_fault", lambda fault, epoch: faults.append(fault))
    monkeypatch.setattr(cluster, "_unanswered", {1: now_s})
    for idle in (False, False, False, True, False, True):  # a look every stall deadline
        now_s += OPTIONS.stall_s
        stages[1].is_idle = idle
        cluster._check_steps(0.0)
        assert faults == []
    now_s += OPTIONS.stall_s / 2
    cluster._check_steps(0.0)
    assert faults == []
    now_s += OPTIONS.stall_s
    cluster._check_steps(0.0)
    assert "a step was lost on its way" in str(faults[0]), "idle at every look for longer than the deadline"
