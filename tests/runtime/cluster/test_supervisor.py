"""A cluster of real stage processes: right tokens, every fault told in time and mended, nothing left behind."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import resolve
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import (
    CheckpointError,
    EngineStoppedError,
    ProtocolError,
    RuntimeFault,
    StageDiedError,
    StageError,
    StageOutOfMemoryError,
    StageStalledError,
)
from exo_kimi.runtime.cluster import supervisor
from exo_kimi.runtime.cluster.cluster_plan import ClusterPlan, StagePlan, make_plan
from exo_kimi.runtime.cluster.supervisor import ClusterOptions, StageCluster
from exo_kimi.runtime.loading.loader import load_stage
from exo_kimi.runtime.pipeline import Failed, PipelineEvent
from exo_kimi.runtime.requests import SamplingParams
from exo_kimi.runtime.stage.inline import run_chain
from exo_kimi.runtime.stage.worker import StageWorker
from exo_kimi.runtime.steps import Segment, SequenceStart, Step, StepResult

pytestmark = pytest.mark.asyncio(loop_scope="module")
LIGHT = "import sys; from exo_kimi.models.mlx_lm_package import skip_mlx_lm_init; skip_mlx_lm_init()\n"
REAL = (sys.executable, "-m", "exo_kimi.runtime.stage")
FAKE = (sys.executable, "-c", LIGHT + Path(__file__).with_name("fake_stage.py").read_text())
OUT_OF_MEMORY, MLX_OUT_OF_MEMORY, BUG, SLEEP, COMPUTE, EXIT, LONG_LINE, HARMLESS = range(1, 9)
PROMPT = tuple(range(40, 60))
QUICK = ClusterOptions(stall_s=3.0, heartbeat_s=0.25, child_command=REAL)
step_ids = itertools.count(1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("cluster") / "tiny")


@pytest.fixture(scope="module")
def expected(tiny: Path) -> list[int]:
    """Twelve greedy tokens of the whole model in this process."""
    model = load_stage(resolve(open_index(tiny)), dtype="float32")
    worker = StageWorker(model, epoch=1, stage=0)
    tokens: list[int] = []
    while len(tokens) < 12:
        tokens.append(run_chain([worker], next_step(1, tokens, 1)).sampled[0].token_id)
    return tokens


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tiny: Path) -> AsyncIterator[StageCluster]:
    """One cluster for many tests: it is its job to be as new after each."""
    cluster = StageCluster(make_plan(Checkpoint(tiny), stages=2, dtype="float32"), QUICK)
    await cluster.start()
    try:
        await cluster.wait_ready()
        yield cluster
    finally:
        await cluster.close()


@pytest_asyncio.fixture(loop_scope="module")
async def cluster(shared: StageCluster) -> StageCluster:
    """The shared cluster, ready, with no event pending."""
    await ready(shared)
    return shared


@pytest_asyncio.fixture(loop_scope="module")
async def clusters() -> AsyncIterator[list[StageCluster]]:
    """Clusters of a single test, closed after it."""
    made: list[StageCluster] = []
    yield made
    for one in made:
        await one.close()


def next_step(epoch: int, generated: Sequence[int], seq_id: int | None = None) -> Step:
    """The prompt, or the next token after it."""
    seq_id = next(step_ids) if seq_id is None else seq_id  # no name is used twice
    tokens = np.array(generated[-1:] if generated else PROMPT, np.int32)
    offset = len(PROMPT) + len(generated) - 1 if generated else 0
    start = SequenceStart(seq_id=seq_id, prompt_tokens=len(PROMPT), sampling=SamplingParams(temperature=0))
    return Step(
        epoch=epoch,
        step_id=next(step_ids),
        segments=(Segment(seq_id=seq_id, offset=offset, length=len(tokens), sample=True),),
        tokens=tokens,
        begin=() if generated else (start,),
    )


def do(epoch: int, what: int) -> Step:
    """A step for fake stages."""
    segment = Segment(seq_id=1, offset=0, length=1, sample=True)
    return Step(epoch=epoch, step_id=next(step_ids), segments=(segment,), tokens=np.array([what], np.int32))


async def event(one: StageCluster, deadline_s: float = 90.0) -> PipelineEvent:
    return await asyncio.wait_for(one.receive(), deadline_s)


async def ready(one: StageCluster) -> int:
    """The epoch in which the cluster is ready, after all that was pending."""
    while not one._events.empty() or not one._ready:
        await event(one)
    return one._epoch


async def generate(one: StageCluster, count: int = 12) -> list[int]:
    epoch, tokens, seq_id = await ready(one), list[int](), next(step_ids)
    while len(tokens) < count:
        await one.send(next_step(epoch, tokens, seq_id))
        result = await event(one)
        assert isinstance(result, StepResult), result
        tokens.append(result.sampled[0].token_id)
    await one.send(Step(epoch=epoch, step_id=0, segments=(), tokens=np.zeros(0, np.int32), free=(seq_id,)))
    assert await event(one) == StepResult(epoch=epoch, step_id=0, sampled=())
    return tokens


async def start(made: list[StageCluster], plan: ClusterPlan, options: ClusterOptions) -> StageCluster:
    made.append(StageCluster(plan, options))
    await made[-1].start()
    return made[-1]


def pids(one: StageCluster) -> list[int]:
    found = [stage.pid for stage in one.health()]
    assert all(found)
    return [pid for pid in found if pid is not None]


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def failure(one: StageCluster, deadline_s: float) -> RuntimeFault:
    """The next Failed; results that were on their way do not count."""
    async with asyncio.timeout(deadline_s):
        while not isinstance(found := await one.receive(), Failed):
            assert isinstance(found, StepResult)
    assert found.recovering
    return found.error


async def test_two_stages_generate_what_one_model_does(cluster: StageCluster, expected: list[int]) -> None:
    assert await generate(cluster) == expected
    assert await generate(cluster) == expected


async def test_another_split_generates_the_same(tiny: Path, clusters: list[StageCluster], expected: list[int]) -> None:
    one = await start(clusters, make_plan(Checkpoint(tiny), split="1,5,1", dtype="float32"), QUICK)
    await one.wait_ready()
    assert await generate(one) == expected


async def test_health_tells_who_holds_what(cluster: StageCluster, tiny: Path) -> None:
    await generate(cluster, 2)
    async with asyncio.timeout(20):  # the first heartbeat may take a second
        while not all(stage.peak_bytes and not stage.sequences for stage in cluster.health()):
            await asyncio.sleep(QUICK.heartbeat_s)
    for stage, plan in zip(cluster.health(), cluster.plan.stages, strict=True):
        assert (stage.stage, stage.state) == (plan.load.stage, "ready")
        assert (stage.start_layer, stage.end_layer) == (plan.load.start_layer, plan.load.end_layer)
        assert stage.total_bytes == stage.loaded_bytes == resolve(open_index(tiny), *_range(plan)).disk_bytes
        assert 0 < stage.weights_bytes <= stage.peak_bytes
        assert stage.kv_bytes == stage.sequences == 0
        assert stage.silent_s < 1
    info = cluster.info()
    assert info is not None
    assert info.kv_capacity_tokens > 1000
    assert (info.context, info.vocab_size) == (131072, 1024)


def _range(plan: StagePlan) -> tuple[int, int]:
    return plan.load.start_layer, plan.load.end_layer


@pytest.mark.parametrize("victim", [0, 1])
async def test_a_killed_stage_is_told_at_once_and_the_next_steps_are_served(
    cluster: StageCluster, expected: list[int], victim: int
) -> None:
    before, earlier = pids(cluster), cluster._last_fault
    generating = asyncio.create_task(generate(cluster, 1000))
    await asyncio.sleep(0.3)
    started_s = time.monotonic()
    os.kill(before[victim], signal.SIGKILL)
    with pytest.raises((AssertionError, RuntimeFault)):
        await generating
    # A step that cannot be sent may be refused a moment before the reason is known.
    while cluster._last_fault is earlier:
        await asyncio.sleep(0.01)
    assert time.monotonic() - started_s < 8  # at once, on a machine that other tests keep busy
    fault = cluster._last_fault
    assert isinstance(fault, StageDiedError)
    assert fault.stage == victim
    assert "SIGKILL" in str(fault)
    assert await generate(cluster) == expected
    after = pids(cluster)
    assert after[victim] != before[victim]
    assert after[1 - victim] == before[1 - victim], "the healthy stage keeps its process and weights"
    assert not lives(before[victim])
    health = cluster.health()[victim]
    assert health.restarts >= 1
    assert health.last_error is not None and "SIGKILL" in health.last_error


async def test_a_stopped_stage_is_a_stall_within_the_deadline(cluster: StageCluster, expected: list[int]) -> None:
    epoch, before = await ready(cluster), pids(cluster)
    os.kill(before[1], signal.SIGSTOP)
    started_s = time.monotonic()
    await cluster.send(next_step(epoch, []))
    fault = await failure(cluster, 30)
    assert isinstance(fault, StageStalledError)
    assert fault.stage == 1
    assert QUICK.stall_s - 1 < time.monotonic() - started_s < QUICK.stall_s + 8
    assert await generate(cluster) == expected
    assert not lives(before[1])


async def test_a_refused_step_ends_the_epoch_but_no_process(cluster: StageCluster, expected: list[int]) -> None:
    epoch, before = await ready(cluster), pids(cluster)
    wrong = next_step(epoch, [5])
    await cluster.send(wrong)
    fault = await failure(cluster, 30)
    assert isinstance(fault, ProtocolError)
    assert fault.stage == 0
    with pytest.raises(RuntimeFault):
        await cluster.send(next_step(epoch, []))
    assert await ready(cluster) > epoch
    assert pids(cluster) == before
    assert await generate(cluster) == expected


async def test_steps_in_flight_are_answered_in_order(cluster: StageCluster) -> None:
    epoch = await ready(cluster)
    seq_ids = [next(step_ids) for _ in range(20)]
    steps = [next_step(epoch, [], seq_id) for seq_id in seq_ids]
    for step in steps:
        await cluster.send(step)
    results = [await event(cluster) for _ in steps]
    assert [r.step_id for r in results if isinstance(r, StepResult)] == [step.step_id for step in steps]
    await cluster.send(Step(epoch=epoch, step_id=0, segments=(), tokens=np.zeros(0, np.int32), free=tuple(seq_ids)))
    await event(cluster)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="how often a thread woke is read from /proc")
async def test_an_idle_cluster_hardly_wakes_and_never_spins(cluster: StageCluster) -> None:
    await ready(cluster)

    def used() -> tuple[int, float]:
        wakes, ticks = 0, 0
        for pid in (*pids(cluster), os.getpid()):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
            for path in Path(f"/proc/{pid}/task").glob("*/status"):
                wakes += int(path.read_text().partition("\nvoluntary_ctxt_switches:")[2].split()[0])
        return wakes, ticks / os.sysconf("SC_CLK_TCK")

    wakes, processor_s = used()
    await asyncio.sleep(2)
    more_wakes, more_s = used()
    assert more_wakes - wakes < 1000  # a hundred: beats and looks at processes
    assert more_s - processor_s < 1, "a loop that spins takes all of two seconds"


async def test_closing_leaves_no_process_no_file_and_no_waiter(tiny: Path, clusters: list[StageCluster]) -> None:
    one = await start(clusters, make_plan(Checkpoint(tiny), stages=2), replace(QUICK, child_command=FAKE))
    await one.wait_ready()
    await event(one)
    waiting = asyncio.create_task(one.receive())
    members, directory = pids(one), one._directory
    await one.send(do(one._epoch, SLEEP))
    await asyncio.sleep(0.1)
    started_s = time.monotonic()
    await one.close()
    assert time.monotonic() - started_s < 15, "also with a stage in the middle of a long step"
    with pytest.raises(EngineStoppedError):
        await waiting
    with pytest.raises(EngineStoppedError):
        await one.send(do(1, HARMLESS))
    assert not any(lives(pid) for pid in members)
    assert directory is not None and not directory.exists()


@pytest.mark.parametrize(
    ("what", "error"),
    [(OUT_OF_MEMORY, StageOutOfMemoryError), (MLX_OUT_OF_MEMORY, StageOutOfMemoryError), (BUG, StageError)],
)
async def test_a_failing_step_is_told_by_its_kind_and_the_stages_go_on(
    fakes: StageCluster, what: int, error: type[RuntimeFault]
) -> None:
    epoch, before = await ready(fakes), pids(fakes)
    await fakes.send(do(epoch, what))
    fault = await failure(fakes, 30)
    assert type(fault) is error
    assert fault.stage == 0
    await serves(fakes)
    assert pids(fakes) == before


async def test_the_last_words_of_a_process_are_told(fakes: StageCluster) -> None:
    await fakes.send(do(await ready(fakes), EXIT))
    fault = await failure(fakes, 30)
    assert isinstance(fault, StageDiedError)
    assert "exit code 3" in str(fault)
    assert "these are my last words" in str(fault)
    await serves(fakes)


async def test_a_step_that_never_ends_is_a_stall(fakes: StageCluster) -> None:
    epoch = await ready(fakes)
    await fakes.send(do(epoch, SLEEP))
    fault = await failure(fakes, 40)
    assert isinstance(fault, StageStalledError)
    assert "at one thing" in str(fault)
    await serves(fakes)


async def test_a_long_mlx_computation_does_not_silence_the_heartbeats(fakes: StageCluster) -> None:
    await fakes.send(do(await ready(fakes), COMPUTE))
    silences = []
    result = asyncio.create_task(event(fakes))
    while not result.done():
        silences.append(fakes.health()[0].silent_s)
        await asyncio.sleep(0.05)
    assert isinstance(await result, StepResult)
    assert len(silences) > 10
    assert max(silences) < 1.0, "MLX lets go of the interpreter while it computes"


async def test_a_line_without_end_in_the_log_blocks_nobody(fakes: StageCluster) -> None:
    await fakes.send(do(await ready(fakes), LONG_LINE))
    assert isinstance(await event(fakes), StepResult)


async def serves(one: StageCluster) -> None:
    await one.send(do(await ready(one), HARMLESS))
    assert isinstance(await event(one), StepResult)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_fakes(tiny: Path) -> AsyncIterator[StageCluster]:
    options = ClusterOptions(stall_s=1.5, heartbeat_s=0.2, child_command=FAKE)
    one = StageCluster(make_plan(Checkpoint(tiny), stages=2), options)
    await one.start()
    try:
        await one.wait_ready()
        yield one
    finally:
        await one.close()


@pytest_asyncio.fixture(loop_scope="module")
async def fakes(shared_fakes: StageCluster) -> StageCluster:
    await ready(shared_fakes)
    return shared_fakes


async def test_progress_of_loading_is_visible(
    tiny: Path, clusters: list[StageCluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_LOAD_S", "1.5")
    options = ClusterOptions(stall_s=3, heartbeat_s=0.1, child_command=FAKE)
    one = await start(clusters, make_plan(Checkpoint(tiny), stages=1), options)
    seen = set()
    waiting = asyncio.create_task(one.wait_ready())
    while not waiting.done():
        (stage,) = one.health()
        seen.add((stage.state, stage.loaded_bytes))
        await asyncio.sleep(0.02)
    await waiting
    assert {state for state, _ in seen} >= {"starting", "loading"}
    assert len([done for state, done in seen if state == "loading" and 0 < done < 1000]) >= 3
    assert one.health()[0].state == "ready"


async def test_stages_that_never_start_are_told_with_their_last_words(
    tiny: Path, clusters: list[StageCluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_BACKOFF_S", 0.01)
    options = replace(QUICK, child_command=(sys.executable, "-c", "import sys; sys.exit('no luck today')"))
    one = await start(clusters, make_plan(Checkpoint(tiny), stages=1), options)
    with pytest.raises(StageDiedError, match=r"(?s)exit code 1.*no luck today"):
        await asyncio.wait_for(one.wait_ready(), 10)
    events = [await event(one) for _ in range(supervisor.GIVE_UP_AFTER + 1)]
    assert isinstance(events[-1], Failed) and not events[-1].recovering


async def test_stages_that_keep_failing_are_refused_but_tried_again(
    clusters: list[StageCluster], tmp_path: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(supervisor, "SLOW_RETRY_S", 0.2)
    directory = make_tiny(tmp_path / "tiny")
    one = await start(clusters, make_plan(Checkpoint(directory), stages=1, dtype="float32"), QUICK)
    await one.wait_ready()
    await ready(one)
    directory.rename(tmp_path / "away")
    os.kill(pids(one)[0], signal.SIGKILL)
    async with asyncio.timeout(90):
        while not (isinstance(found := await one.receive(), Failed) and not found.recovering):
            pass
    assert "no such checkpoint directory" in str(found.error)
    (tmp_path / "away").rename(directory)
    assert await generate(one) == expected


async def test_weights_that_do_not_fit_are_refused_before_loading(
    tiny: Path, clusters: list[StageCluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FREE_BYTES", "1000")
    one = await start(clusters, make_plan(Checkpoint(tiny), stages=1), replace(QUICK, child_command=FAKE))
    with pytest.raises(StageOutOfMemoryError, match="weights of stage 0 do not fit"):
        await asyncio.wait_for(one.wait_ready(), 10)


async def test_a_checkpoint_that_changed_since_the_plan_is_refused(
    tmp_path: Path, clusters: list[StageCluster]
) -> None:
    directory = make_tiny(tmp_path / "tiny", seed=1)
    plan = make_plan(Checkpoint(directory), stages=1)
    directory.rename(tmp_path / "first")
    make_tiny(directory, seed=2)
    one = await start(clusters, plan, QUICK)
    with pytest.raises(CheckpointError, match="not those of the leader"):
        await asyncio.wait_for(one.wait_ready(), 15)
