"""`exo-kimi stage` on what plays another machine: keys, leaders that come and go, own shards, and no orphan ever."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import resolve
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import (
    AddressError,
    CheckpointError,
    KeyMismatchError,
    NotACheckpointError,
    StageDiedError,
    StageUnreachableError,
)
from exo_kimi.runtime.cluster.cluster_plan import make_plan
from exo_kimi.runtime.cluster.supervisor import ClusterOptions, StageCluster
from exo_kimi.runtime.loading.loader import load_stage
from exo_kimi.runtime.pipeline import Failed, Ready
from exo_kimi.runtime.requests import SamplingParams
from exo_kimi.runtime.stage.inline import run_chain
from exo_kimi.runtime.stage.process import serve_stage
from exo_kimi.runtime.stage.worker import StageWorker
from exo_kimi.runtime.steps import Segment, SequenceStart, Step, StepResult
from exo_kimi.runtime.transport.keys import ClusterKey

LIGHT = "import sys; from exo_kimi.models.mlx_lm_package import skip_mlx_lm_init; skip_mlx_lm_init()\n"
SERVE = LIGHT + (
    "from pathlib import Path; import logging; logging.basicConfig(level=logging.INFO)\n"
    "from exo_kimi.runtime.stage.process import serve_stage\n"
    "_, listen, model, key_file = sys.argv\n"
    "serve_stage(listen, model=model or None, key_file=Path(key_file) if key_file else None, environment_key=None)\n"
)
REAL = (sys.executable, "-m", "exo_kimi.runtime.stage")
OPTIONS = ClusterOptions(stall_s=5, heartbeat_s=0.25, connect_s=3, child_command=REAL)
OpenCluster = Callable[..., Coroutine[Any, Any, StageCluster]]


class RemoteStage:
    """A `serve_stage` process and what it says."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.said: list[str] = []
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(
        cls, *, listen: str = "127.0.0.1:0", model: Path | None = None, key_file: Path | None = None, **environment: str
    ) -> RemoteStage:
        arguments = (listen, str(model or ""), str(key_file or ""))
        stage = cls(
            await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                SERVE,
                *arguments,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=os.environ | environment,
            )
        )
        await stage.says("listening on")
        return stage

    @property
    def address(self) -> str:
        return next(line for line in self.said if "listening on" in line).split()[2].rstrip(",")

    async def says(self, text: str, *, deadline_s: float = 60) -> str:
        async with asyncio.timeout(deadline_s):
            while not (lines := [line for line in self.said if text in line]):
                assert not self._reading.done(), self.said
                await asyncio.sleep(0.02)
        return lines[-1]

    async def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()
        await self._reading

    async def _read(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            self.said.append(line.decode().rstrip())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("remote") / "tiny")


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.key"
    ClusterKey.generate().write(path)
    return path


@pytest.fixture
async def stages() -> AsyncIterator[list[RemoteStage]]:
    made: list[RemoteStage] = []
    yield made
    for stage in made:
        await stage.end()


@pytest.fixture
async def open_cluster(tiny: Path) -> AsyncIterator[OpenCluster]:
    made: list[StageCluster] = []

    async def start(
        *remotes: str, key: ClusterKey | None = None, directory: Path = tiny, stages: int | None = None
    ) -> StageCluster:
        plan = make_plan(Checkpoint(directory), stages=stages, remotes=remotes, key=key, dtype="float32")
        made.append(StageCluster(plan, OPTIONS))
        await made[-1].start()
        return made[-1]

    yield start
    for cluster in made:
        await cluster.close()


names = itertools.count(1)


def first_step(epoch: int) -> Step:
    seq_id = next(names)  # none is used twice
    return Step(
        epoch=epoch,
        step_id=1,
        segments=(Segment(seq_id=seq_id, offset=0, length=5, sample=True),),
        tokens=np.arange(40, 45, dtype=np.int32),
        begin=(SequenceStart(seq_id=seq_id, prompt_tokens=5, sampling=SamplingParams(temperature=0)),),
    )


async def first_token(cluster: StageCluster) -> int:
    """A greedy token after a fixed prompt, in the epoch that comes next."""
    async with asyncio.timeout(90):
        while not isinstance(event := await cluster.receive(), Ready):
            assert isinstance(event, Failed)
        await cluster.send(first_step(event.epoch))
        result = await cluster.receive()
    assert isinstance(result, StepResult)
    return result.sampled[0].token_id


async def test_a_remote_stage_with_a_key_serves_one_leader_after_another(
    stages: list[RemoteStage], open_cluster: OpenCluster, key_file: Path
) -> None:
    stages.append(await RemoteStage.start(key_file=key_file))
    address, key = stages[0].address, ClusterKey.read(key_file)
    first = await open_cluster(address, key=key)
    token = await first_token(first)
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as stranger:
        stranger.sendall(os.urandom(4000))
    second = await open_cluster(address, key=key, stages=1)
    with pytest.raises(StageUnreachableError, match="serves another leader"):
        await second.wait_ready()
    await first.close()
    await stages[0].says("the leader left")
    third = await open_cluster(address, key=key)
    assert await first_token(third) == token
    assert third.health()[1].pid == stages[0].process.pid
    stages[0].process.send_signal(signal.SIGINT)
    assert await asyncio.wait_for(stages[0].process.wait(), 5) == 0
    assert not any("Traceback" in line for line in stages[0].said)


async def test_a_key_that_does_not_match_is_refused_in_time(
    stages: list[RemoteStage], open_cluster: OpenCluster, key_file: Path
) -> None:
    stages.append(await RemoteStage.start(key_file=key_file))
    for key in (ClusterKey.generate(), None):
        started_s = time.monotonic()
        cluster = await open_cluster(stages[0].address, key=key, stages=1)
        with pytest.raises(KeyMismatchError, match="key"):
            await cluster.wait_ready()
        assert time.monotonic() - started_s < 8


async def test_a_remote_stage_that_dies_is_told_and_taken_back_when_it_returns(
    stages: list[RemoteStage], open_cluster: OpenCluster
) -> None:
    stages.append(await RemoteStage.start())
    address = stages[0].address
    cluster = await open_cluster(address)
    token = await first_token(cluster)
    started_s = time.monotonic()
    await stages[0].end()
    event = await asyncio.wait_for(cluster.receive(), 20)
    assert isinstance(event, Failed) and isinstance(event.error, StageDiedError)
    assert event.error.stage == 1
    assert time.monotonic() - started_s < 8  # at once, on a machine that other tests keep busy
    local_pid = cluster.health()[0].pid
    stages.append(await RemoteStage.start(listen=address))
    assert await first_token(cluster) == token
    assert cluster.health()[0].pid == local_pid


async def test_a_stage_that_cannot_be_reached_is_an_error_in_time(open_cluster: OpenCluster) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        cluster = await open_cluster(f"127.0.0.1:{reserved.getsockname()[1]}", stages=1)
        with pytest.raises(StageUnreachableError, match="nothing listens there"):
            await asyncio.wait_for(cluster.wait_ready(), OPTIONS.connect_s + 2)


async def test_a_machine_may_hold_its_own_shards_only_and_not_others(
    stages: list[RemoteStage], open_cluster: OpenCluster, tmp_path: Path
) -> None:
    whole = make_tiny(tmp_path / "whole", shards=7)
    others = make_tiny(tmp_path / "others", seed=9)
    plan = make_plan(Checkpoint(whole), stages=2)
    load = plan.stages[1].load
    needed = {
        entry.file
        for source in resolve(open_index(whole), load.start_layer, load.end_layer).sources
        for entries in source.parts.values()
        for entry in entries
    }
    part = tmp_path / "part"
    part.mkdir()
    for name in (*needed, "config.json", "model.safetensors.index.json"):
        shutil.copy(whole / name, part / name)
    assert len(list(part.glob("*.safetensors"))) < 7
    stages.append(await RemoteStage.start(model=part))
    cluster = await open_cluster(stages[0].address, directory=whole)
    alone = StageWorker(load_stage(resolve(open_index(whole)), dtype="float32"), epoch=1)
    assert await first_token(cluster) == run_chain([alone], first_step(1)).sampled[0].token_id
    await cluster.close()
    wrong = await open_cluster(stages[0].address, directory=others, stages=1)
    with pytest.raises(CheckpointError):
        await wrong.wait_ready()


LEADER = (
    LIGHT
    + """
import asyncio
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.runtime.cluster.cluster_plan import make_plan
from exo_kimi.runtime.cluster.supervisor import ClusterOptions, StageCluster
async def lead():
    plan = make_plan(Checkpoint(sys.argv[1]), remotes=sys.argv[2:])
    cluster = StageCluster(plan, ClusterOptions())
    await cluster.start()
    await cluster.wait_ready()
    print(*(stage.pid for stage in cluster.health()), ";", cluster.health()[0].address, flush=True)
    await asyncio.sleep(60)
asyncio.run(lead())
"""
)


async def test_children_end_when_their_leader_is_killed_and_a_remote_stage_takes_the_next(
    tiny: Path, stages: list[RemoteStage], open_cluster: OpenCluster
) -> None:
    stages.append(await RemoteStage.start())
    leader = await asyncio.create_subprocess_exec(
        sys.executable, "-c", LEADER, str(tiny), stages[0].address, stdout=asyncio.subprocess.PIPE
    )
    assert leader.stdout is not None
    pids, socket_path = (await asyncio.wait_for(leader.stdout.readline(), 90)).decode().split(";")
    child, remote = map(int, pids.split())
    directory = Path(socket_path.strip().removeprefix("ipc://")).parent
    assert directory.exists()
    assert remote == stages[0].process.pid
    leader.kill()
    await leader.wait()
    deadline_s = time.monotonic() + 10
    while _lives(child) and time.monotonic() < deadline_s:
        await asyncio.sleep(0.02)
    assert not _lives(child)
    assert not directory.exists()
    cluster = await open_cluster(stages[0].address, stages=1)
    await asyncio.wait_for(cluster.wait_ready(), 5)
    await stages[0].says("the leader is gone")


SUSPENDED_LEADER = (
    LIGHT
    + """
import asyncio
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.runtime.cluster.cluster_plan import make_plan
from exo_kimi.runtime.cluster.supervisor import ClusterOptions, StageCluster
async def lead():
    plan = make_plan(Checkpoint(sys.argv[1]), stages=1, remotes=sys.argv[2:])
    cluster = StageCluster(plan, ClusterOptions(stall_s=1.0, heartbeat_s=0.2))
    await cluster.start()
    while True:
        print(type(await cluster.receive()).__name__, flush=True)
asyncio.run(lead())
"""
)


async def test_a_leader_that_was_suspended_gets_its_remote_stage_back(tiny: Path, stages: list[RemoteStage]) -> None:
    stages.append(await RemoteStage.start())
    leader = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SUSPENDED_LEADER, str(tiny), stages[0].address, stdout=asyncio.subprocess.PIPE
    )
    assert leader.stdout is not None
    try:
        assert await asyncio.wait_for(leader.stdout.readline(), 90) == b"Ready\n"
        leader.send_signal(signal.SIGSTOP)
        await stages[0].says("the leader is gone", deadline_s=20)
        leader.send_signal(signal.SIGCONT)
        assert await asyncio.wait_for(leader.stdout.readline(), 20) == b"Failed\n"
        assert await asyncio.wait_for(leader.stdout.readline(), 20) == b"Ready\n"
    finally:
        leader.kill()
        await leader.wait()


def _lives(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    if status.exists():
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_listening_to_other_machines_makes_a_key_and_tells_the_command(
    stages: list[RemoteStage], tmp_path: Path
) -> None:
    stages.append(await RemoteStage.start(listen="0.0.0.0:0", HOME=str(tmp_path)))
    path = tmp_path / ".config" / "exo-kimi" / "cluster.key"
    command = await stages[0].says("on the other machine")
    key = ClusterKey.read(path)
    assert (
        f"EXO_KIMI_KEY={shlex.quote(key.secret.decode())} exo-kimi serve DIR --stage {socket.gethostname()}:" in command
    )
    stages.append(await RemoteStage.start(listen="0.0.0.0:0", HOME=str(tmp_path)))
    again = await stages[1].says("on the other machine")
    assert key.secret.decode() not in again, "a key that is there already is not shown again"


def test_a_port_in_use_or_a_bad_address_is_a_usage_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(AddressError, match="is in use"):
            _serve(f"127.0.0.1:{taken.getsockname()[1]}")
    with pytest.raises(AddressError, match="cannot read an address"):
        _serve("5000")


def test_a_model_directory_that_is_none_is_told_before_a_leader_comes(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpointError, match="no such checkpoint directory"):
        _serve("127.0.0.1:0", model=str(tmp_path / "missing"))


def _serve(listen: str, model: str | None = None) -> None:
    serve_stage(listen, model=model, key_file=None, environment_key=None, say=lambda _: None)
