"""On the real exo, two nodes on loopback, with exo's own engine: what is placed, what it answers, what survives a kill.

How to run (Linux; about three minutes):

    EXO_SRC=CHECKOUT EXO_PYTHON=VENV/bin/python python -m pytest tests/plugin/control/test_real_exo.py -m exo

EXO_SRC is a checkout of exo at b5375f8ce. EXO_PYTHON is a Python 3.13 with exo's locked packages, mlx[cpu] 0.32.0, mlx-lm of
exo's fork at 6a3df6cd, mlx-vlm 0.4.4 without its dependencies and eclipse-zenoh 1.10, and a distribution named `exo`.
The stand-in for exo's Rust module is tests/plugin/standin (see exo_kimi/bench/setups/exo_here.py).
Nodes listen on 127.n.x.1 and 127.n.x.2 only (x from the process id), ports 52413 to 52415.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import ExoLoadError, ExoRefusedError
from exo_kimi.plugin.control.apply import Applied, apply_plan
from exo_kimi.plugin.control.http import ExoClient
from exo_kimi.plugin.control.instance import assign_nodes, ring_instance
from exo_kimi.plugin.control.plan import exo_plan
from exo_kimi.plugin.control.prepare import prepare
from exo_kimi.plugin.control.texts import status_text
from exo_kimi.plugin.control.watch import Deadlines

pytestmark = [pytest.mark.exo, pytest.mark.timeout(600)]

MODEL = "lab/kimi-k2-tiny"
PROMPTS = ("Tell me about the sea.", "How many layers has a cake?", "今天天气怎么样?")
TOKENS = 24
DEADLINES = Deadlines(poll_s=0.3, connect_s=150.0, quiet_s=180.0)


@pytest.fixture(scope="module")
def cluster(exo_head: Any, real_exo: Any, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two nodes that both have the whole tiny Kimi."""
    if isinstance(exo_head, str):
        pytest.skip(exo_head)
    root = tmp_path_factory.mktemp("exo")
    prepare(tiny, root / "models", model_id=MODEL)
    with real_exo.exo_cluster(exo_head, root, root / "models") as running:
        yield running


@pytest.fixture
def client(cluster: Any) -> Iterator[ExoClient]:
    with ExoClient(cluster.url) as opened:
        yield opened


@pytest.fixture
def place(client: ExoClient, tiny: Path) -> Any:
    """Plan a split for the cluster as it is, place it, wait for an answer."""

    def run(*split: int, **options: Any) -> Applied:
        plan = exo_plan(client.state(), tiny, model_id=MODEL, context=4096, split=split).plan
        return apply_plan(client, plan, replace=True, deadlines=DEADLINES, **options)

    return run


def greedy(url: str, prompt: str, *, tokens: int = TOKENS, model: str = MODEL) -> list[tuple[str, float]]:
    """Tokens of a greedy answer with their log probabilities."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 1,
    }
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120, trust_env=False).json()
    return [(entry["token"], entry["logprob"]) for entry in reply["choices"][0]["logprobs"]["content"]]


def loaded_layers(cluster: Any, applied: Applied, client: ExoClient) -> dict[str, int]:
    """Node name -> layers that its runner said it was loading, from exo's own events."""
    instance = client.state().instance(applied.instance_id)
    assert instance is not None
    names = client.state().names
    runners = {shard.runner_id: names[shard.node_id] for shard in instance.shards}
    found = {}
    for event in cluster.events():
        body = event.get("event", event).get("RunnerStatusUpdated")
        loading = body and body["runner_status"].get("RunnerLoading")
        if loading and body["runner_id"] in runners and loading["total_layers"]:
            found[runners[body["runner_id"]]] = loading["total_layers"]
    return found


@pytest.fixture(scope="module")
def alone(cluster: Any, tiny: Path) -> list[list[tuple[str, float]]]:
    """What one node with all layers answers."""
    with ExoClient(cluster.url) as client:
        plan = exo_plan(client.state(), tiny, model_id=MODEL, context=4096, split=(7,)).plan
        apply_plan(client, plan, replace=True, deadlines=DEADLINES)
        return [greedy(cluster.url, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("split", [(5, 2), (2, 5)])
def test_a_split_answers_as_one_node_does(
    cluster: Any, client: ExoClient, place: Any, alone: Any, split: tuple[int, int]
) -> None:
    applied = place(*split)
    answers = [greedy(cluster.url, prompt) for prompt in PROMPTS]
    assert [[token for token, _ in answer] for answer in answers] == [
        [token for token, _ in answer] for answer in alone
    ]
    assert all(len(answer) == TOKENS for answer in answers)
    names = [each.name for each in applied.assignments]
    assert loaded_layers(cluster, applied, client) == dict(zip(names, split, strict=True))


def test_each_node_needs_only_its_share(cluster: Any, client: ExoClient, alone: Any) -> None:
    """Fewer files on each node than the checkpoint has, and the same tokens."""
    many = make_tiny(cluster.root / "many", dtype="F32", shards=12)
    model_id = "lab/kimi-k2-shares"
    numbers = {node.number: start for node, start in zip(cluster.nodes, (0, 5), strict=True)}
    for number, start in numbers.items():
        share = prepare(
            many, cluster.models_of(number), model_id=model_id, start_layer=start, end_layer={0: 5, 5: 7}[start]
        )
        assert len(share.weight_files) <= {0: 10, 5: 6}[start]
    plan = exo_plan(client.state(), many, model_id=model_id, context=4096, split=(5, 2)).plan
    assert [stage.machine.rpartition(".")[2] for stage in plan.stages] == ["1", "2"]
    for instance in client.state().instances:
        client.delete(instance.instance_id)
    applied = apply_plan(client, plan, deadlines=DEADLINES)
    assert loaded_layers(cluster, applied, client) == {each.name: each.layers for each in applied.assignments}
    answer = greedy(cluster.url, PROMPTS[0], model=model_id)
    assert [token for token, _ in answer] == [token for token, _ in alone[0]]
    client.delete(applied.instance_id)


def test_the_rank_order_is_the_plans_and_not_exos(cluster: Any, client: ExoClient, place: Any, alone: Any) -> None:
    """Whichever node exo names first, either can hold the first layers."""
    plan = exo_plan(client.state(), cluster.models / "lab--kimi-k2-tiny", context=4096, split=(5, 2)).plan
    first, second = (stage.machine for stage in plan.stages)
    swapped = {first: second, second: first}
    applied = apply_plan(client, plan, nodes=swapped, replace=True, deadlines=DEADLINES)
    assert loaded_layers(cluster, applied, client) == {second: 5, first: 2}
    assert [token for token, _ in greedy(cluster.url, PROMPTS[0])] == [token for token, _ in alone[0]]


def test_our_hosts_are_those_that_exo_would_give(cluster: Any, client: ExoClient, place: Any) -> None:
    place(5, 2)
    state = client.state()
    plan = exo_plan(state, cluster.models / "lab--kimi-k2-tiny", context=4096, split=(5, 2)).plan
    previews = [p for p in client.previews(MODEL) if p.sharding == "Pipeline" and len(p.node_ids) == 2 and p.instance]
    theirs = previews[0].instance["MlxRingInstance"]  # type: ignore[index]
    ranked = sorted(
        theirs["shardAssignments"]["nodeToRunner"],
        key=lambda node: next(
            iter(theirs["shardAssignments"]["runnerToShard"][theirs["shardAssignments"]["nodeToRunner"][node]].values())
        )["deviceRank"],
    )
    swap = {stage.machine: node for stage, node in zip(plan.stages, ranked, strict=True)}
    card = previews[0].card
    assert card is not None
    ours = ring_instance(assign_nodes(plan, state, nodes=swap), state, card, port=theirs["ephemeralPort"])
    assert ours["MlxRingInstance"]["hostsByNode"] == theirs["hostsByNode"]


def test_exo_takes_a_gap_and_answers_so_the_check_is_ours(
    cluster: Any, client: ExoClient, place: Any, alone: Any
) -> None:
    """If this ever fails because exo refuses, exo has learned to check."""
    placed = place(5, 2)
    state = client.state()
    card = state.cards[MODEL]
    instance = ring_instance(placed.assignments, state, card, port=50123)
    shards = instance["MlxRingInstance"]["shardAssignments"]["runnerToShard"]
    next(iter(shards.values()))["PipelineShardMetadata"]["endLayer"] = 4
    client.delete(placed.instance_id)
    time.sleep(2)
    client.create(instance)
    runners = list(shards)
    deadline = time.monotonic() + 90
    while any(
        client.state().runners.get(r) is None or client.state().runners[r].phase != "RunnerReady" for r in runners
    ):
        assert time.monotonic() < deadline, status_text(client.state(), where=cluster.url)
        time.sleep(0.5)
    assert [token for token, _ in greedy(cluster.url, PROMPTS[0])] != [token for token, _ in alone[0]]
    client.delete(instance["MlxRingInstance"]["instanceId"])


def test_a_tensor_parallel_instance_is_placed_and_loads(
    cluster: Any, real_exo: Any, place: Any, client: ExoClient, alone: Any
) -> None:
    """Its first token is right. exo's own decoding hangs at the second, on MLX's CPU and ring backends (b5375f8ce)."""
    applied = place(5, 2, tensor=True, wait=False)
    assert {(each.start_layer, each.end_layer) for each in applied.assignments} == {(0, 7)} and len(
        applied.assignments
    ) == 2

    def ready() -> bool:
        state = client.state()
        instance = state.instance(applied.instance_id)
        assert instance is not None and {shard.kind for shard in instance.shards} == {"Tensor"}
        return all(state.runners[shard.runner_id].phase == "RunnerReady" for shard in instance.shards)

    real_exo.wait_until(ready, 90, cluster.tail)
    assert greedy(cluster.url, PROMPTS[0], tokens=1)[0][0] == alone[0][0][0]


def test_a_killed_runner_is_an_error_and_placing_again_works(cluster: Any, place: Any, alone: Any) -> None:
    place(5, 2)
    with ExoClient(cluster.url) as client:
        killer = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import os, time; time.sleep(2); os.kill({cluster.nodes[1].runner()}, {signal.SIGKILL})",
            ]
        )
        began = time.monotonic()
        with pytest.raises(ExoRefusedError, match="broke off"):
            client.answer(MODEL, PROMPTS[0], max_tokens=20_000, timeout_s=60)
        assert time.monotonic() - began < 30
        assert killer.wait() == 0
    place(2, 5)
    assert [token for token, _ in greedy(cluster.url, PROMPTS[0])] == [token for token, _ in alone[0]]


def test_a_killed_node_is_told_and_placing_again_works_when_it_is_back(
    cluster: Any, real_exo: Any, client: ExoClient, place: Any, alone: Any
) -> None:
    place(5, 2)
    node = cluster.nodes[1]
    plan = exo_plan(client.state(), cluster.models / "lab--kimi-k2-tiny", context=4096, split=(5, 2)).plan
    left = node.children()
    os.kill(node.process.pid, signal.SIGKILL)
    node.process.wait(10)
    try:
        real_exo.wait_until(lambda: len(client.state().nodes) == 1, 90, cluster.tail)
        assert "its node has left the cluster" in status_text(client.state(), where=cluster.url)
    finally:
        for pid in left:  # exo leaves runners behind when a node is killed
            os.kill(pid, signal.SIGKILL)
    cluster.start(2)
    cluster.wait_seen()
    applied = apply_plan(client, plan, replace=True, deadlines=DEADLINES)
    assert loaded_layers(cluster, applied, client) == {each.name: each.layers for each in applied.assignments}
    assert [token for token, _ in greedy(cluster.url, PROMPTS[0])] == [token for token, _ in alone[0]]


def test_what_served_is_placed_again_when_its_replacement_fails(
    cluster: Any, client: ExoClient, place: Any, alone: Any
) -> None:
    first = place(5, 2)
    names = [each.name for each in first.assignments]
    plan = exo_plan(client.state(), cluster.models / "lab--kimi-k2-tiny", context=4096, nodes=names[::-1]).plan
    assert [stage.machine for stage in plan.stages] == names[::-1]

    def fail(progress: Any) -> None:
        if any(each.phase != "Waiting" for each in progress):
            raise ExoLoadError("a test ends it here")

    with pytest.raises(ExoLoadError, match=r"what was there before is placed again, instance .* and ready"):
        apply_plan(client, plan, replace=True, deadlines=DEADLINES, report=fail)
    (instance,) = client.state().instances
    assert instance.instance_id != first.instance_id
    assert [(shard.start_layer, shard.end_layer) for shard in instance.shards] == [(0, 5), (5, 7)]
    assert [token for token, _ in greedy(cluster.url, PROMPTS[0])] == [token for token, _ in alone[0]]


def test_a_node_without_the_files_is_named(cluster: Any, client: ExoClient, tiny: Path) -> None:
    """Offline, exo says so itself; the card is known because the other model's directory was there when it was added."""
    other = "lab/kimi-k2-gone"
    made = prepare(tiny, cluster.models, model_id=other)
    client.add_model(other)
    for path in made.directory.iterdir():
        path.unlink()
    made.directory.rmdir()
    plan = exo_plan(client.state(), tiny, model_id=other, context=4096, split=(5, 2)).plan
    with pytest.raises(ExoLoadError, match="does not have the model"):
        apply_plan(client, plan, deadlines=DEADLINES)
    assert all(instance.model_id != other for instance in client.state().instances)
