"""A node without our engine, and one with another version of it, on the real exo: named within ten seconds, by every door.

How to run (Linux; about two minutes): as `test_real_exo.py` says, with this file.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from exo_kimi.errors import ExoPlacementError
from exo_kimi.plugin.control import command
from exo_kimi.plugin.control.apply import apply_plan
from exo_kimi.plugin.control.http import ExoClient
from exo_kimi.plugin.control.plan import exo_plan
from exo_kimi.plugin.control.prepare import prepare

pytestmark = [pytest.mark.exo, pytest.mark.timeout(400)]

MODEL = "lab/kimi-k2-tiny"
NAMED_S = 10.0
_IF = "import os\nif os.environ['NODE_IP'].endswith('.{}'):\n    "
BARE = _IF.format(1) + "from exo_kimi.plugin.runner.launch import bind\n    assert bind() == ()\n"
OTHER = (
    _IF.format(2) + "from exo_kimi.runtime.protocol.versions import Versions\n"
    "    Versions.installed = lambda: Versions(exo_kimi='99.0', mlx='0', mlx_lm='0')\n"
)


@pytest.fixture(scope="module", params=["bare", "other version"])
def cluster(
    exo_head: Any, real_exo: Any, tiny: Path, tmp_path_factory: pytest.TempPathFactory, request: Any
) -> Iterator[tuple[Any, str]]:
    """Two nodes, the second of which is not as the first; and the words about it."""
    if isinstance(exo_head, str) or (reason := exo_head.cannot_import_us()):
        pytest.skip(exo_head if isinstance(exo_head, str) else reason)
    models = tmp_path_factory.mktemp("models")
    prepare(tiny, models, model_id=MODEL)
    root = tmp_path_factory.mktemp("exo")
    plugin, words = (
        (BARE, "does not run exo-kimi's engine")
        if request.param == "bare"
        else (OTHER + real_exo.BIND_US, "different versions of exo-kimi")
    )
    with real_exo.exo_cluster(exo_head, root, models, plugin=plugin) as running:
        yield running, words


def test_apply_names_it_before_anything_is_placed(cluster: tuple[Any, str], tiny: Path) -> None:
    exo, words = cluster
    with ExoClient(exo.url) as client:
        plan = exo_plan(client.state(), tiny, model_id=MODEL, context=4096, split=(5, 2), our_engine=True).plan
        began = time.monotonic()
        with pytest.raises(ExoPlacementError, match=words) as refused:
            apply_plan(client, plan, model_id=MODEL)
        assert time.monotonic() - began < NAMED_S
        second = next(node for node in client.state().nodes if exo.nodes[1].address in node.interfaces)
        assert client.state().names[second.node_id] in str(refused.value)
        assert not client.state().instances
    text = command.status(exo.url)
    assert ("exo's own engine only" in text) == (words.startswith("does not")) and ("99.0" in text) == (
        "99.0" in str(refused.value)
    )
    print(text)


@pytest.mark.parametrize("ours_first", [True, False])
def test_a_runner_names_it_when_another_door_placed_the_model(
    cluster: tuple[Any, str], real_exo: Any, ours_first: bool
) -> None:
    exo, words = cluster
    with ExoClient(exo.url) as client:
        client.add_model(MODEL)
        real_exo.wait_until(lambda: MODEL in client.model_ids(), 20, exo.tail)
        second = next(node.node_id for node in client.state().nodes if exo.nodes[1].address in node.interfaces)
        preview = next(
            each
            for each in client.previews(MODEL)
            if each.instance and each.sharding == "Pipeline" and each.meta == "MlxRing" and len(each.node_ids) == 2
        )
        assert preview.instance is not None
        instance = _ordered(dict(preview.instance), last=second, swap=not ours_first)
        client.create(instance)
        connecting_s: list[float] = []
        told: list[str] = []

        def named() -> bool:
            runners = client.state().runners
            if not connecting_s and any(each.phase == "RunnerConnecting" for each in runners.values()):
                connecting_s.append(time.monotonic())
            told[:] = [each.message for each in runners.values() if words in each.message]
            return bool(told)

        real_exo.wait_until(named, 60, exo.tail)
        took_s = time.monotonic() - connecting_s[0] if connecting_s else 0.0
        print(f"named {took_s:.1f} s after the first runner connected: {told[0]}")
        assert took_s < NAMED_S and second in told[0]
        for each in client.state().instances:
            client.delete(each.instance_id)
        real_exo.wait_until(lambda: not client.state().instances, 30, exo.tail)


def _ordered(instance: dict[str, Any], *, last: str, swap: bool) -> dict[str, Any]:
    """exo's instance with one node as the last rank, or as the first: the nodes change places if need be."""
    (body,) = instance.values()
    assigned = body["shardAssignments"]
    ranks = {
        node: next(iter(assigned["runnerToShard"][runner].values()))["deviceRank"]
        for node, runner in assigned["nodeToRunner"].items()
    }
    if (ranks[last] == 1) != (not swap):
        one, other = assigned["nodeToRunner"]
        runners = assigned["nodeToRunner"]
        runners[one], runners[other] = runners[other], runners[one]
        body["hostsByNode"] = {node: list(reversed(hosts)) for node, hosts in body["hostsByNode"].items()}
    return instance
