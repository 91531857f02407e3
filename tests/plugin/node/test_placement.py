"""Our planner behind exo's own placing: which split it gives, and what of exo's API is bound, in modules of exo's shape."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from exo_kimi.errors import ExoPlacementError
from exo_kimi.plugin.control.plan import exo_plan
from exo_kimi.plugin.control.prepare import prepare
from exo_kimi.plugin.node import command as node_command
from exo_kimi.plugin.node.keeper import KeptPlan
from exo_kimi.plugin.node.placement import PlacementPlanner, WantedPlacement, bind_planner

MODEL = "lab/kimi-k2-tiny"
STUDIO, MINI, THIRD = "a" * 32, "b" * 32, "d" * 32


@pytest.fixture(scope="module")
def models(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    prepare(tiny, folder, model_id=MODEL)
    return folder


@pytest.fixture
def three(make_exo: Any, fake_exo: Any) -> Any:
    """Three nodes; the third is the smallest."""
    exo = make_exo()
    exo.nodes.append(
        fake_exo.FakeNode(
            node_id=THIRD,
            name="air",
            ip="169.254.1.3",
            chip="Apple M4 Pro",
            total_bytes=64 << 30,
            free_bytes=50 << 30,
            has={MODEL},
        )
    )
    return exo


def ranges(instance: Any) -> list[tuple[str, int, int]]:
    """Node and layers of each rank."""
    ((_, body),) = instance.items()
    assigned = body["shardAssignments"]
    nodes = {runner: node for node, runner in assigned["nodeToRunner"].items()}
    shards = {nodes[runner]: next(iter(shard.values())) for runner, shard in assigned["runnerToShard"].items()}
    ranked = sorted(shards, key=lambda node: shards[node]["deviceRank"])
    return [(node, shards[node]["startLayer"], shards[node]["endLayer"]) for node in ranked]


def contexts(instance: Any) -> set[int]:
    """Tokens of one sequence, as every shard's card says."""
    ((_, body),) = instance.items()
    shards = body["shardAssignments"]["runnerToShard"].values()
    return {next(iter(shard.values()))["modelCard"]["contextLength"] for shard in shards}


def planner(models: Path, said: list[str], *kept: KeptPlan) -> PlacementPlanner:
    return PlacementPlanner(kept, [models], said.append)


def test_what_is_placed_by_exos_doors_is_what_our_plan_says(
    three: Any, client_of: Any, models: Path, tiny: Path
) -> None:
    state, said = client_of(three).state(), []
    made = planner(models, said).ring(WantedPlacement(card=three.cards[MODEL], ring=True), state)
    plan = exo_plan(state, tiny, model_id=MODEL, our_engine=True).plan
    names = state.names
    assert [(names[node], start, end) for node, start, end in ranges(made)] == [
        (stage.machine, stage.start_layer, stage.end_layer) for stage in plan.stages
    ]
    assert len(said) == 1 and "gets our split, planned now: studio 0:7" in said[0]


@pytest.mark.parametrize("count", [2, 3])
def test_as_many_nodes_as_are_asked_for(count: int, three: Any, client_of: Any, models: Path) -> None:
    wanted = WantedPlacement(card=three.cards[MODEL], ring=True, min_nodes=count)
    made = ranges(planner(models, []).ring(wanted, client_of(three).state()))
    assert len({node for node, *_ in made}) == count
    assert [start for _, start, _ in made] == [0, *(end for *_, end in made[:-1])] and made[-1][2] == 7


def test_the_nodes_that_are_asked_for_take_part(three: Any, client_of: Any, models: Path) -> None:
    wanted = WantedPlacement(card=three.cards[MODEL], ring=True, required=frozenset([THIRD]))
    assert THIRD in [node for node, *_ in ranges(planner(models, []).ring(wanted, client_of(three).state()))]


def test_a_kept_plan_comes_first_and_an_impossible_one_does_not_hinder(
    three: Any, client_of: Any, models: Path, plan_of: Any
) -> None:
    kept = KeptPlan.of(plan_of(three, (3, 4), nodes=["mini", "studio"]))
    said: list[str] = []
    wanted = WantedPlacement(card=three.cards[MODEL], ring=True)
    asked = planner(models, said, kept)
    assert ranges(asked.ring(wanted, client_of(three).state())) == [(MINI, 0, 3), (STUDIO, 3, 7)]
    assert "the kept plan: mini 0:3" in said[0]
    assert contexts(asked.ring(wanted, client_of(three).state())) == {4096}
    three.nodes = [node for node in three.nodes if node.name != "mini"]
    assert MINI not in [node for node, *_ in ranges(asked.ring(wanted, client_of(three).state()))]
    wide = replace(wanted, min_nodes=3)
    assert asked.takes(wide.card)
    with pytest.raises(ExoPlacementError, match="no plan over so many nodes"):
        asked.ring(wide, client_of(three).state())


def test_memory_that_is_taken_is_told_and_not_planned_around(three: Any, client_of: Any, models: Path) -> None:
    for node in three.nodes:
        node.free_bytes = 1 << 20
    with pytest.raises(ExoPlacementError, match="bytes\\) short"):
        planner(models, []).ring(WantedPlacement(card=three.cards[MODEL], ring=True), client_of(three).state())


def test_on_rdma_the_nodes_stay_exos_and_the_boundary_is_ours(three: Any, client_of: Any, models: Path) -> None:
    state = client_of(three).state()
    placed = three._preview(MODEL, "Pipeline", "MlxRing", [MINI, STUDIO])[0]["MlxRingInstance"]
    jaccl = {key: placed[key] for key in ("instanceId", "shardAssignments")} | {"jacclDevices": [[None, "rdma_en2"]]}
    wanted = WantedPlacement(card=three.cards[MODEL], ring=False)
    moved = planner(models, []).moved(wanted, state, {"MlxJacclInstance": jaccl})
    plan = exo_plan(state, models / "lab--kimi-k2-tiny", our_engine=True, nodes=["mini", "studio"]).plan
    assert [(start, end) for _, start, end in ranges(moved)] == list(plan.ranges)
    assert [node for node, *_ in ranges(moved)] == [MINI, STUDIO]
    assert contexts(moved) == {plan.workload.context}
    assert moved["MlxJacclInstance"]["jacclDevices"] == jaccl["jacclDevices"]
    tensor = three._preview(MODEL, "Tensor", "MlxRing", [MINI, STUDIO])[0]
    assert planner(models, []).moved(wanted, state, tensor) is None


def test_a_node_without_all_layers_leaves_it_to_exo_and_says_so_once(
    three: Any, client_of: Any, tiny: Path, tmp_path: Path
) -> None:
    wanted, state = WantedPlacement(card=three.cards[MODEL], ring=True), client_of(three).state()
    said: list[str] = []
    assert planner(tmp_path, said).ring(wanted, state) is None and "does not have its files" in said[0]
    prepare(tiny, tmp_path, model_id=MODEL, start_layer=0, end_layer=1)
    share = planner(tmp_path, said)
    assert [share.ring(wanted, state), share.ring(wanted, state)] == [None, None]
    assert len(said) == 2 and "this node cannot plan it" in said[1]


def test_other_models_are_not_ours(models: Path, tiny: Path, tmp_path: Path) -> None:
    asked = planner(models, [])
    assert asked.takes({"modelId": "lab/x", "family": "kimi"})
    assert not asked.takes({"modelId": "mlx-community/Llama-3.2-1B", "family": "llama"})
    made = prepare(tiny, tmp_path, model_id="lab/kimi-k2-other").directory
    (made / "config.json").unlink()
    (made / "config.json").write_text('{"model_type": "llama"}')
    assert not planner(tmp_path, []).takes({"modelId": "lab/kimi-k2-other", "family": ""})


class Shaped(SimpleNamespace):
    """A model of exo's, of JSON."""

    def model_dump(self, *, mode: str, by_alias: bool) -> Any:
        return self.raw


def _exo_api(state: Any, sent: list[Any]) -> ModuleType:
    """exo's API in the shape that is bound: one placement function, three methods that use it."""
    main = ModuleType("exo.api.main")

    class ModelCard:
        @staticmethod
        async def load(model_id: str) -> Any:
            return Shaped(raw=state.cards.get(model_id) or {"modelId": model_id, "family": "llama"})

    def model(*fields: str) -> type:
        return type("Model", (SimpleNamespace,), {"model_fields": dict.fromkeys(fields)})

    place = model("model_card", "sharding", "instance_meta", "min_nodes")
    create, params = model("instance"), model("instance")
    response = model("message", "command_id", "model_card")
    create.command_id = "c"  # type: ignore[attr-defined]
    params.model_validate = lambda raw: params(instance=Shaped(raw=raw["instance"], instance_id="new"))  # type: ignore[attr-defined]

    def get_instance_placements(command: Any, *, current_instances: Any, required_nodes: Any = None) -> Any:
        return {**current_instances, "exos": "exo's own"}

    class API:
        state = Shaped(raw=None, instances={})

        async def _send(self, command: Any) -> None:
            sent.append(command)

        async def place_instance(self, payload: Any) -> Any:
            await self._send("PlaceInstance")

        async def get_placement(self, model_id: Any, sharding: Any, instance_meta: Any, min_nodes: int) -> Any:
            card = await main.ModelCard.load(model_id)
            command = place(model_card=card, sharding=sharding, instance_meta=instance_meta, min_nodes=min_nodes)
            (made,) = main.get_instance_placements(command, current_instances={}).values()
            return made

        async def get_placement_previews(self, model_id: Any, node_ids: Any = None) -> Any:
            return await API.get_placement(self, model_id, "Pipeline", "MlxRing", 2)

    vars(main).update(
        API=API,
        ModelCard=ModelCard,
        PlaceInstance=place,
        CreateInstance=create,
        CreateInstanceParams=params,
        CreateInstanceResponse=response,
        get_instance_placements=get_instance_placements,
    )
    return main


@pytest.fixture
def api(three: Any, client_of: Callable[[Any], Any], models: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """exo's API in this process, with what it sends."""
    sent: list[Any] = []
    client_of(three).state()
    main = _exo_api(three, sent)
    vars(main)["API"].state = Shaped(raw=three._snapshot(), instances={})
    for name in ("exo", "exo.api"):
        package = ModuleType(name)
        package.__path__ = []
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setitem(sys.modules, "exo.api.main", main)
    monkeypatch.setenv("EXO_MODELS_READ_ONLY_DIRS", str(models))
    logged: list[str] = []
    monkeypatch.setattr(node_command, "tell_exos_log", logged.append)
    return SimpleNamespace(main=main, sent=sent, logged=logged)


def ask(model: str, sharding: str = "Pipeline", nodes: int = 2) -> SimpleNamespace:
    return SimpleNamespace(model_id=model, sharding=sharding, instance_meta="MlxRing", min_nodes=nodes)


def test_every_door_of_exos_api_gives_our_split(api: SimpleNamespace) -> None:
    said: list[str] = []
    assert bind_planner((), said.append) == () and "get our split (--no-plan" in said[0]
    opened = api.main.API()
    preview = asyncio.run(opened.get_placement_previews(MODEL))
    placement = asyncio.run(opened.get_placement(MODEL, "Pipeline", "MlxRing", 2))
    asyncio.run(opened.place_instance(ask(MODEL)))
    (sent,) = api.sent
    assert ranges(preview.raw) == ranges(placement.raw) == ranges(sent.instance.raw)
    assert len(ranges(preview.raw)) == 2
    assert len(api.logged) == 1 and "gets our split" in api.logged[0]


def test_what_is_not_a_pipeline_of_a_kimi_stays_exos(api: SimpleNamespace) -> None:
    bind_planner((), lambda line: None)
    opened = api.main.API()
    assert asyncio.run(opened.get_placement(MODEL, "Tensor", "MlxRing", 2)) == "exo's own"
    assert asyncio.run(opened.get_placement("lab/llama", "Pipeline", "MlxRing", 2)) == "exo's own"
    asyncio.run(opened.place_instance(ask(MODEL, "Tensor")))
    asyncio.run(opened.place_instance(ask("lab/llama")))
    assert api.sent == ["PlaceInstance", "PlaceInstance"]


def test_what_cannot_be_placed_is_an_error_that_exos_api_shows(api: SimpleNamespace) -> None:
    bind_planner((), lambda line: None)
    with pytest.raises(ValueError, match="exo-kimi: no plan over so many nodes"):
        asyncio.run(api.main.API().get_placement(MODEL, "Pipeline", "MlxRing", 4))


def test_binding_twice_wraps_once_and_another_api_is_left_as_it_is(api: SimpleNamespace) -> None:
    bind_planner((), lambda line: None)
    bound = api.main.API.place_instance
    bind_planner((), lambda line: None)
    assert api.main.API.place_instance is bound
    del api.main.API.get_placement
    said: list[str] = []
    assert bind_planner((), said.append) and said[-1].endswith("gets exo's own split")
