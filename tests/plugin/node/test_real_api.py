"""exo's own API object in exo's own Python, without nodes: our planner behind its previews, its placement and /place_instance.

Runs where EXO_SRC (b5375f8ce) or EXO_71_SRC (v1.0.71) point at a checkout, as ../standin/README.md says; some seconds for each.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from exo_kimi.bench.setups.exo_here import REPOSITORY
from exo_kimi.plugin.control.plan import exo_plan
from exo_kimi.plugin.control.prepare import prepare
from exo_kimi.plugin.control.state import parse_state

pytestmark = [pytest.mark.exo, pytest.mark.timeout(300)]

MODEL = "lab/kimi-k2-tiny"
SCRIPT = """
import asyncio, json, sys

told = json.load(sys.stdin)
if told["bind"]:
    from exo_kimi.plugin.node.placement import bind_planner

    assert bind_planner((), lambda line: None) == ()
import exo.api.main as main
from exo.api.types import PlaceInstanceParams
from exo.shared.models.model_cards import ModelId
from exo.shared.types.state import State


class Api(main.API):
    def __init__(self):
        self.state = State.model_validate_json(json.dumps(told["state"]))
        self.sent = []

    async def _send(self, command):
        self.sent.append(command)


def layers(instance):
    return [[shard.start_layer, shard.end_layer] for shard in instance.shard_assignments.runner_to_shard.values()]


async def ask():
    api, model = Api(), ModelId(told["model"])
    previews = (await api.get_placement_previews(model)).previews
    placement = await api.get_placement(model, min_nodes=3)
    await api.place_instance(PlaceInstanceParams(model_id=model, min_nodes=3))
    (command,) = api.sent
    rings = [p for p in previews if (p.sharding.value, p.instance_meta.value) == ("Pipeline", "MlxRing") and p.instance]
    return {
        "previews": [layers(preview.instance) for preview in rings],
        "placement": layers(placement),
        "sent": type(command).__name__,
        "placed": layers(command.instance) if hasattr(command, "instance") else None,
        "tensor": [layers(p.instance) for p in previews if p.sharding.value == "Tensor" and p.instance][:1],
    }


print("told", json.dumps(asyncio.run(ask())))
"""


@pytest.fixture(params=["exo_head", "exo_71"])
def exo(request: pytest.FixtureRequest) -> Any:
    found = request.getfixturevalue(request.param)
    if isinstance(found, str) or (reason := found.cannot_import_us()):
        pytest.skip(found if isinstance(found, str) else reason)
    return found


def test_the_api_of_each_exo_gives_our_split_and_without_our_planner_its_own(
    exo: Any, fake_exo: Any, tiny: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    prepare(tiny, tmp_path / "models", model_id=MODEL)
    (tmp_path / "dashboard").mkdir()
    older = "71" in request.node.callspec.id
    state = state_of(fake_exo, older=older)
    plan = exo_plan(
        parse_state(state, where="a test"), tiny, model_id=MODEL, our_engine=True, nodes=["b", "a", "c"]
    ).plan
    told = {}
    for bind in (True, False):
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
            "PYTHONPATH": ":".join(map(str, [*exo.paths, exo.standin, exo.source / "src", REPOSITORY])),
            "PYTHONDONTWRITEBYTECODE": "1",
            "EXO_OFFLINE": "true",
            "HF_HUB_OFFLINE": "1",
            "EXO_DASHBOARD_DIR": str(tmp_path / "dashboard"),
            "EXO_MODELS_READ_ONLY_DIRS": str(tmp_path / "models"),
        }
        run = subprocess.run(
            [str(exo.python), "-c", SCRIPT],
            input=json.dumps({"bind": bind, "state": as_exo_reads_it(state), "model": MODEL}),
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        lines = [line for line in run.stdout.splitlines() if line.startswith("told ")]
        assert run.returncode == 0 and lines, run.stderr[-3000:]
        told[bind] = json.loads(lines[0].removeprefix("told "))
    ours, exos = told[True], told[False]
    assert ours["placement"] == ours["placed"] == [list(each) for each in plan.ranges]
    assert ours["previews"][-1] == ours["placement"] and len(ours["previews"]) == 3
    assert ours["sent"] == "CreateInstance" and exos["sent"] == "PlaceInstance"
    assert exos["placement"] != ours["placement"]
    assert ours["tensor"] == exos["tensor"] == [[[0, 7]]]


def state_of(fake_exo: Any, *, older: bool) -> dict[str, Any]:
    """Three Macs, the second with most of the memory, as exo's JSON."""
    sizes = {"a": 16, "b": 64, "c": 16}
    nodes = [
        fake_exo.FakeNode(node_id=name * 32, name=name, ip=f"169.254.1.{n}", total_bytes=g << 30, free_bytes=g << 30)
        for n, (name, g) in enumerate(sizes.items(), start=1)
    ]
    state: dict[str, Any] = fake_exo.FakeExo(nodes=nodes, older=older)._snapshot()
    del state["nodeRdmaCtl"]
    if not older:
        state["nodeBackends"] = {node.node_id: ["MlxMetal"] for node in nodes}
    return state


def as_exo_reads_it(state: dict[str, Any]) -> dict[str, Any]:
    """The same without what exo computes when it tells it."""
    read: dict[str, Any] = json.loads(json.dumps(state))
    for sinks in read["topology"]["connections"].values():
        for edge in [edge for edges in sinks.values() for edge in edges]:
            edge["sinkMultiaddr"] = {"address": edge["sinkMultiaddr"]["address"]}
    return read
