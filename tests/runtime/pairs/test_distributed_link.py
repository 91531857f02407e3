"""Hidden states over `mx.distributed`: a real ring on this machine, and peers that die, hang or never come."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from pathlib import Path

import pytest

import exo_kimi
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import StageUnreachableError
from exo_kimi.runtime.cluster.cluster_plan import make_plan
from exo_kimi.runtime.cluster.supervisor import ClusterOptions, StageCluster
from exo_kimi.runtime.engine.engine import Engine
from exo_kimi.runtime.pairs.distributed_link import announce, announced_bytes
from exo_kimi.runtime.pairs.link_helper_client import LinkHelper
from exo_kimi.runtime.pairs.pairing import Pair, rdma_device
from exo_kimi.runtime.requests import GenerationRequest, SamplingParams
from exo_kimi.runtime.stage.inline import InlinePipeline

pytestmark = pytest.mark.timeout(90)
SMALL = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 64, "n_routed_experts": 8}
IFCONFIG = """\
lo0: flags=8049<UP,LOOPBACK,RUNNING,MULTICAST> mtu 16384
\tinet 127.0.0.1 netmask 0xff000000
en5: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
\tether 36:2c:94:d1:8e:14
\tinet6 fe80::4ae%en5 prefixlen 64 scopeid 0xb
\tinet 10.0.5.1 netmask 0xffffff00 broadcast 10.0.5.255
bridge0: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
\tinet 10.0.9.1 netmask 0xffffff00 broadcast 10.0.9.255
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ring() -> Pair:
    return Pair(backend="ring", sender=f"127.0.0.1:{free_port()}", receiver=f"127.0.0.1:{free_port()}")


@pytest.fixture
async def pair() -> AsyncIterator[tuple[LinkHelper, LinkHelper]]:
    pair = ring()
    helpers = await asyncio.gather(*(LinkHelper.start(pair, rank, deadline_s=20) for rank in (0, 1)))
    yield helpers[0], helpers[1]
    for helper in helpers:
        helper.close()


def test_a_ring_s_environment_names_both_sides(tmp_path: Path) -> None:
    pair = Pair(backend="ring", sender="10.0.0.1:7000", receiver="10.0.0.2:7001")
    assert pair.environment(1, tmp_path) == {"MLX_RANK": "1", "MLX_HOSTFILE": str(tmp_path / "hosts.json")}
    assert pair.files() == {"hosts.json": '[["10.0.0.1:7000"], ["10.0.0.2:7001"]]'}


def test_jaccl_s_environment_names_the_device_of_each_to_the_other(tmp_path: Path) -> None:
    pair = Pair(
        backend="jaccl",
        sender="10.0.5.1:7000",
        receiver="10.0.5.2:7001",
        sender_device="rdma_en5",
        receiver_device="rdma_en3",
    )
    assert pair.environment(0, tmp_path) == {
        "MLX_RANK": "0",
        "MLX_IBV_DEVICES": str(tmp_path / "devices.json"),
        "MLX_JACCL_COORDINATOR": "10.0.5.1:7000",
    }
    assert pair.files() == {"devices.json": '[[null, "rdma_en5"], ["rdma_en3", null]]'}


def test_an_rdma_device_is_that_of_the_interface_with_the_address() -> None:
    assert rdma_device(IFCONFIG, "10.0.5.1") == "rdma_en5"
    with pytest.raises(StageUnreachableError, match=r"not on a Thunderbolt port(.|\n)*bridge0"):
        rdma_device(IFCONFIG, "10.0.9.1")
    with pytest.raises(StageUnreachableError, match="no interface"):
        rdma_device(IFCONFIG, "10.0.5.11")


def test_a_frame_is_announced_with_the_size_of_what_is_still_to_come() -> None:
    frame, last = announce([b'{"kind":"step"}', b"tokens", b"hidden"])
    assert (announced_bytes(frame), frame[1:], last) == (6, [b'{"kind":"step"}', b"tokens"], b"hidden")
    assert announced_bytes([b'{"kind":"step"}', b"tokens"]) is None
    assert announced_bytes([]) is None


async def test_bytes_arrive_as_they_were_sent_and_in_order(pair: tuple[LinkHelper, LinkHelper]) -> None:
    sender, receiver = pair
    frames = [os.urandom(size) for size in (1, 14_336, 7_340_032, 3)]
    sending = asyncio.create_task(send_all(sender, frames))
    for frame in frames:
        assert await receiver.receive(len(frame), deadline_s=20) == frame
    await sending


async def send_all(sender: LinkHelper, frames: list[bytes]) -> None:
    for frame in frames:
        await sender.send(frame, deadline_s=20)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_peer_that_dies_or_hangs_is_an_error_within_the_deadline(
    pair: tuple[LinkHelper, LinkHelper], stop: signal.Signals
) -> None:
    sender, receiver = pair
    os.kill(receiver.pid, stop)
    started_s = time.monotonic()
    with pytest.raises(StageUnreachableError, match="ring link"):
        for _ in range(50):
            await sender.send(bytes(1 << 20), deadline_s=1.5)
    with pytest.raises(StageUnreachableError, match="ring link"):
        await receiver.receive(5, deadline_s=1.5)
    assert time.monotonic() - started_s < 10


async def test_a_peer_that_never_comes_is_an_error_and_leaves_no_process() -> None:
    with pytest.raises(StageUnreachableError, match="stuck"):
        await LinkHelper.start(ring(), 0, deadline_s=1.5)


def test_a_link_helper_ends_with_its_stage_also_while_it_waits_in_mlx() -> None:
    code = (
        "import asyncio, sys; sys.path[:] = " + repr(sys.path) + "\n"
        "from exo_kimi.runtime.pairs.link_helper_client import LinkHelper\n"
        "from exo_kimi.runtime.pairs.pairing import Pair\n"
        f"pair = Pair(backend='ring', sender='127.0.0.1:{free_port()}', receiver='127.0.0.1:{free_port()}')\n"
        "async def main():\n"
        "    both = await asyncio.gather(*(LinkHelper.start(pair, rank, deadline_s=20) for rank in (0, 1)))\n"
        "    print(*(one.pid for one in both), flush=True)\n"
        "    await both[1].receive(5, deadline_s=60)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        time.sleep(0.5)
        process.kill()
    assert len(pids) == 2
    until_s = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < until_s:
        time.sleep(0.05)
    assert not any(map(alive, pids))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")  # a zombie is gone for all that matters here
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


# Stages whose hidden states go over it.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("ring") / "tiny", dtype="F32", seed=3, config=SMALL)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[int]:
    """What the same two stages say in one process."""

    def load() -> list[exo_kimi.models.kimi_k2.Model]:
        return [exo_kimi.load(checkpoint, a, b, dtype="float32") for a, b in pairwise((0, 4, 7))]

    async def run() -> list[int]:
        pipeline = InlinePipeline(load, stages=2, context=512, kv_capacity_tokens=4096, cache_step=256)
        async with Engine(pipeline) as engine:
            return await answer(engine)

    return asyncio.run(run())


async def answer(engine: Engine) -> list[int]:
    sampling = SamplingParams(temperature=0.0)
    request = GenerationRequest(request_id="r", prompt_ids=tuple(range(3, 40)), max_tokens=12, sampling=sampling)
    return [event.token_id async for event in engine.generate(request)]


def link_helpers_of(pid: int) -> list[int]:
    """Children of a stage, from the process table."""
    listed = subprocess.run(["ps", "-eww", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    return [int(row[0]) for row in rows if int(row[1]) == pid and "exo_kimi.runtime.pairs.link_helper" in row[2]]


async def test_stages_on_a_ring_give_the_same_tokens_and_survive_what_happens_to_it(
    checkpoint: Path, expected: list[int]
) -> None:
    plan = make_plan(Checkpoint(checkpoint), split="4,3", dtype="float32")
    options = ClusterOptions(context=512, kv_bytes=1 << 26, link="ring", stall_s=4, heartbeat_s=0.5)
    cluster = StageCluster(plan, options)
    engine = Engine(cluster, prefill_chunk=16)
    await cluster.start()
    async with engine:
        await engine.wait_ready()
        assert await answer(engine) == expected
        first, last = (stage.pid for stage in engine.snapshot().stages)
        assert first is not None and last is not None
        troubles: list[tuple[Callable[[], int], signal.Signals]] = [
            (lambda: link_helpers_of(first)[0], signal.SIGSTOP),  # type: ignore[arg-type]
            (lambda: last, signal.SIGKILL),  # type: ignore[arg-type, return-value]
        ]
        for whom, what in troubles:
            restarts = engine.snapshot().restarts_total
            os.kill(whom(), what)
            with pytest.raises(exo_kimi.errors.RuntimeFault):
                for _ in range(40):
                    await asyncio.wait_for(answer(engine), 20)
                    await asyncio.sleep(0.1)
            while engine.snapshot().restarts_total == restarts:
                await asyncio.sleep(0.05)
            assert await answer(engine) == expected
            # A link helper's end costs no weights: the stages are the same processes.
            assert engine.snapshot().stages[0].pid == first
        assert engine.snapshot().stages[1].pid != last
    assert link_helpers_of(first) == []
