"""On the real exo: a plan that every node keeps, through kills and restarts; exo's own doors with our planner behind them.

How to run (Linux; about four minutes), with EXO_SRC and EXO_PYTHON as in ../standin/README.md:

    EXO_SRC=CHECKOUT EXO_PYTHON=VENV/bin/python python -m pytest tests/plugin/node/test_real_exo.py -m exo
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from exo_kimi.errors import ExoUnreachableError
from exo_kimi.plugin.control.http import ExoClient
from exo_kimi.plugin.control.plan import exo_plan
from exo_kimi.plugin.control.prepare import prepare
from exo_kimi.plugin.control.state import ClusterState, Instance

pytestmark = [pytest.mark.exo, pytest.mark.timeout(600)]

MODEL = "lab/kimi-k2-tiny"
BACK_S = 60.0  # the bar: served again within so many seconds of the last machine's return
KEEPERS = """
import multiprocessing, os, pathlib, threading, time

from exo_kimi.plugin.node.command import keep_beside, kept_plans
from exo_kimi.plugin.runner.launch import bind

assert bind() == (), bind()


def keep(path):
    while not path.exists():
        time.sleep(0.5)
    keep_beside(f"http://{os.environ['NODE_IP']}:52415", kept_plans([path]))


if multiprocessing.current_process().name == "MainProcess":
    threading.Thread(target=keep, args=[pathlib.Path(os.environ["KEPT_PLAN"])], daemon=True).start()
"""
PLANNERS = """
import multiprocessing, os

from exo_kimi.plugin.node.placement import bind_planner
from exo_kimi.plugin.runner.launch import bind

assert bind() == (), bind()
if os.environ["NODE_IP"].endswith(".2"):
    os.environ["OVERRIDE_MEMORY_MB"] = "12288"  # exo gives layers by memory, our planner by time
if multiprocessing.current_process().name == "MainProcess" and not os.environ["NODE_IP"].endswith(".3"):  # as if with --no-plan
    assert bind_planner((), print) == ()
"""


@pytest.fixture(scope="module")
def models(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    prepare(tiny, folder, model_id=MODEL)
    return folder


@pytest.fixture(scope="module")
def exo(exo_head: Any) -> Any:
    if isinstance(exo_head, str) or (reason := exo_head.cannot_import_us()):
        pytest.skip(exo_head if isinstance(exo_head, str) else reason)
    return exo_head


@pytest.fixture(scope="module")
def kept(exo: Any, real_exo: Any, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two nodes, each of which keeps the plan that is written to `plan.json` beside them."""
    root = tmp_path_factory.mktemp("kept")
    extra = {"KEPT_PLAN": str(root / "plan.json")}
    with real_exo.exo_cluster(exo, root, models, plugin=KEEPERS, extra=extra) as running:
        with ExoClient(running.url) as client:
            plan = exo_plan(
                client.state(), models / "lab--kimi-k2-tiny", context=4096, split=(5, 2), our_engine=True
            ).plan
        plan.save(root / "plan.json")
        yield running


def ask(url: str, *, timeout_s: float = 60) -> str:
    """The text of an answer."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "river"}], "max_tokens": 8, "temperature": 0}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=timeout_s, trust_env=False).json()
    return str(reply["choices"][0]["message"]["content"])


def state_of(url: str) -> ClusterState:
    with ExoClient(url) as client:
        return client.state()


def served(url: str, former: str = "") -> bool:
    """Whether exactly one instance is there, on both nodes, and ready; another than `former`, which exo lists after its end."""
    try:
        state = state_of(url)
    except ExoUnreachableError:  # a node that starts
        return False
    if len(state.instances) != 1 or len(state.nodes) != 2 or state.instances[0].instance_id == former:
        return False
    (instance,) = state.instances
    runners = [state.runners.get(shard.runner_id) for shard in instance.shards]
    there = all(state.node(shard.node_id) is not None for shard in instance.shards)
    return there and all(runner is not None and runner.phase == "RunnerReady" for runner in runners)


def wait_served(cluster: Any, real_exo: Any, within_s: float, former: str = "") -> None:
    began = time.monotonic()
    real_exo.wait_until(lambda: served(cluster.url, former), within_s, cluster.tail)
    print(logs(cluster)[-6000:] if os.environ.get("SHOW_LOGS") else "")
    print(f"served {time.monotonic() - began:.1f} s after the last machine's return")
    assert ask(cluster.url)
    assert [shard.end_layer for shard in state_of(cluster.url).instances[0].shards] == [5, 7]


def logs(cluster: Any) -> str:
    return "".join(node.log.read_text(errors="replace") for node in cluster.nodes)


def test_two_keepers_place_the_plan_once(kept: Any, real_exo: Any) -> None:
    wait_served(kept, real_exo, 90)
    created = [event for event in kept.events() if "InstanceCreated" in event.get("event", event)]
    assert len(created) == 1
    (instance,) = state_of(kept.url).instances
    assert instance.instance_id.startswith("kept-")


def test_a_killed_node_that_is_back_serves_again(kept: Any, real_exo: Any) -> None:
    (former,) = state_of(kept.url).instances
    kept.nodes[1].stop()
    time.sleep(5)
    kept.start(2)
    wait_served(kept, real_exo, BACK_S, former.instance_id)


def test_both_nodes_back_after_a_power_cut_serve_again(kept: Any, real_exo: Any) -> None:
    (former,) = state_of(kept.url).instances
    kept.stop()
    for number in (1, 2):
        kept.start(number)
    wait_served(kept, real_exo, BACK_S, former.instance_id)


def test_what_a_person_ends_stays_ended_until_a_person_places_it(kept: Any, real_exo: Any) -> None:
    with ExoClient(kept.url) as client:
        (instance,) = client.state().instances
        client.delete(instance.instance_id)
        time.sleep(30)
        assert client.state().instances == ()
    assert "somebody ended lab/kimi-k2-tiny" in logs(kept)
    body = {"model_id": MODEL, "sharding": "Pipeline", "instance_meta": "MlxRing", "min_nodes": 2}
    httpx.post(f"{kept.url}/place_instance", json=body, timeout=30, trust_env=False).raise_for_status()
    real_exo.wait_until(lambda: served(kept.url), 60, kept.tail)
    real_exo.wait_until(lambda: "was placed again, and is kept again" in logs(kept), 10, kept.tail)
    assert not state_of(kept.url).instances[0].instance_id.startswith("kept-")


@pytest.fixture(scope="module")
def three(exo: Any, real_exo: Any, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Three nodes with our engine; the third leaves placements to exo's planner."""
    with real_exo.exo_cluster(exo, tmp_path_factory.mktemp("three"), models, nodes=3, plugin=PLANNERS) as running:
        with ExoClient(running.url) as client:
            client.add_model(MODEL)
        yield running


def split_of(instance: Instance) -> list[tuple[str, int, int]]:
    return [(shard.node_id, shard.start_layer, shard.end_layer) for shard in instance.shards]


def placed(url: str, real_exo: Any, cluster: Any) -> Instance:
    """The one instance that is there, once it answers."""

    def ready() -> bool:
        state = state_of(url)
        runners = [state.runners.get(shard.runner_id) for each in state.instances for shard in each.shards]
        return bool(runners) and all(runner is not None and runner.phase == "RunnerReady" for runner in runners)

    real_exo.wait_until(ready, 90, cluster.tail)
    assert ask(url)
    (instance,) = state_of(url).instances
    with ExoClient(url) as client:
        client.delete(instance.instance_id)
    real_exo.wait_until(lambda: not state_of(url).instances, 30, cluster.tail)
    return instance


def test_the_dashboards_placement_of_three_nodes_is_ours_and_without_our_planner_exos(
    three: Any, real_exo: Any, models: Path
) -> None:
    split: dict[int, list[tuple[str, int, int]]] = {}
    for number in (0, 2):  # as the dashboard does: a preview, posted as it is
        url = three.nodes[number].url
        with ExoClient(url) as client:
            (preview,) = [
                each
                for each in client.previews(MODEL)
                if (each.sharding, each.meta) == ("Pipeline", "MlxRing") and len(each.node_ids) == 3
            ]
            client.create(preview.instance or {})
        split[number] = split_of(placed(url, real_exo, three))
    state = state_of(three.url)
    order = [state.names[node] for node, *_ in split[0]]
    plan = exo_plan(state, models / "lab--kimi-k2-tiny", our_engine=True, nodes=order).plan
    ours, exos = ([(start, end) for _, start, end in split[number]] for number in (0, 2))
    assert ours == list(plan.ranges)
    assert exos != ours
    assert "gets our split, planned now" in three.nodes[0].log.read_text(errors="replace")
    assert "gets our split" not in three.nodes[2].log.read_text(errors="replace")


def test_place_instance_is_ours(three: Any, real_exo: Any) -> None:
    body = {"model_id": MODEL, "sharding": "Pipeline", "instance_meta": "MlxRing", "min_nodes": 2}
    httpx.post(f"{three.url}/place_instance", json=body, timeout=30, trust_env=False).raise_for_status()
    instance = placed(three.url, real_exo, three)
    assert len(instance.shards) == 2
    assert "exo-kimi runs lab/kimi-k2-tiny" in logs(three)


def test_what_cannot_be_placed_is_refused_in_our_words(three: Any) -> None:
    body = {"model_id": MODEL, "min_nodes": 4}
    reply = httpx.post(f"{three.url}/place_instance", json=body, timeout=30, trust_env=False)
    assert reply.status_code == 400 and "no plan over so many nodes" in reply.text


def test_a_runner_killed_under_the_kept_plan_is_exos_to_start_again(kept: Any, real_exo: Any) -> None:
    before = len([event for event in kept.events() if "InstanceCreated" in event.get("event", event)])
    os.kill(kept.nodes[1].runner(), signal.SIGKILL)
    time.sleep(3)
    real_exo.wait_until(lambda: served(kept.url), BACK_S, kept.tail)
    assert ask(kept.url)
    assert len([event for event in kept.events() if "InstanceCreated" in event.get("event", event)]) == before
