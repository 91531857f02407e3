"""Two nodes in legacy exo's shape, with what we bind in them: who loads what, what they answer, and what an error does."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from exo_kimi.chat.tokenizer import KimiTokenizer
from exo_kimi.errors import (
    CheckpointProblems,
    ExoKimiError,
    ExoLoadError,
    ExoVersionError,
    OverloadedError,
    PlanInfeasibleError,
    PlanMismatchError,
    UnsupportedError,
    UsageError,
)
from exo_kimi.plugin.legacy import launch
from exo_kimi.plugin.legacy import node as legacy_node
from exo_kimi.plugin.legacy.setup import LegacyOptions, prepare_legacy

PROMPT = "the sea is"  # as it is, without the template: some ten tokens
TOKENS = 5
NAME = "kimi"


@pytest.fixture(scope="module")
def expected(legacy_models: ModuleType, tiny: Path) -> list[int]:
    ids = KimiTokenizer.from_directory(tiny).encode(PROMPT)
    found: list[int] = legacy_models.greedy(tiny, ids, TOKENS)
    return found


async def test_each_node_loads_its_own_layers_on_the_status_and_the_tokens_are_those_of_one_process(
    make: Any, expected: list[int]
) -> None:
    cluster = make()
    assert [stage.loaded for stage in cluster.stages] == [False, False]
    assert await cluster.ask() == expected
    assert [stage.loaded for stage in cluster.stages] == [True, True]
    first, second = cluster.said
    assert any("holds layers 0:5 of kimi: " in line and "bytes resident" in line for line in first)
    assert any(line.startswith("node1 holds layers 0:5: ") for line in second)
    assert [len(cluster.loads(number)) for number in (1, 2)] == [1, 1]
    # From the second node the prompt goes to the first, ids and all; nothing is kept of what ended.
    assert await cluster.ask(number=2, request_id="b") == expected
    await asyncio.sleep(0.05)
    assert [stage.sequences for stage in cluster.stages] == [0, 0]


async def test_a_prompt_in_pieces_gives_the_same_tokens(
    make: Any, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(legacy_node, "PIECE_TOKENS", 2)
    cluster = make()
    assert await cluster.ask() == expected
    shapes = [shape for shape, _ in cluster.nodes[0].peers[0].sent if shape[1] > 1]
    assert len(shapes) >= 2 and {shape[1] for shape in shapes[:-1]} == {2}


@pytest.mark.parametrize("split", [(7,), (3, 2, 2)])
async def test_one_node_or_three_answer_the_same_in_pieces(
    legacy_cluster: Any,
    fake_legacy: ModuleType,
    legacy_shapes: ModuleType,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expected: list[int],
    split: tuple[int, ...],
) -> None:
    monkeypatch.setattr(legacy_node, "PIECE_TOKENS", 2)
    plan = tmp_path / "plan.json"
    legacy_shapes.plan_of_shape(split).save(plan)
    cluster = legacy_cluster(fake_legacy, plan, [tiny] * len(split), monkeypatch)
    assert await cluster.ask(number=len(split)) == expected
    assert [stage.loaded for stage in cluster.stages] == [True] * len(split)


async def test_layers_that_do_not_fit_are_refused_before_they_are_read(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exo_kimi.runtime.stage import resident
    from exo_kimi.runtime.stage.memory import FreeMemory

    monkeypatch.setattr(resident, "free_memory", lambda: FreeMemory(free_bytes=3_000_000, scope="host"))
    cluster = make()
    with pytest.raises(ExoKimiError, match="do not fit") as refused:
        await cluster.ask()
    assert "layers 0:5" in str(refused.value) and "wired_limit_mb" in str(refused.value)
    assert not cluster.stages[0].loaded


def test_no_piece_of_a_published_model_nears_grpcs_limit() -> None:
    assert legacy_node.piece_tokens(7168) * 7168 * 4 < (256 << 20) // 4
    assert legacy_node.piece_tokens(1 << 28) == 1


async def test_a_turn_ends_at_any_stop_id(
    make: Any, legacy_models: Any, tiny: Path, tmp_path: Path, expected: Any
) -> None:
    model = legacy_models.ending(tiny, tmp_path / "ending", expected[3])
    cluster = make(model, model)
    end = KimiTokenizer.from_directory(model).special["<|im_end|>"]
    assert await cluster.ask() == [*expected[:3], end]


async def test_preload_loads_everywhere_before_any_prompt(make: Any) -> None:
    cluster = make()
    hooks = cluster.nodes[0].on_opaque_status.observers["preemptively_load_shard"][0].__self__
    hooks.preload()
    for _ in range(200):
        await asyncio.sleep(0.02)
        if all(stage.loaded for stage in cluster.stages):
            break
    assert [stage.loaded for stage in cluster.stages] == [True, True]
    for task in list(hooks._tasks):
        task.cancel()


async def test_new_engines_and_absent_nodes_do_not_reload(
    make: Any, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(legacy_node, "SEEN_S", 0.0)
    cluster = make()
    assert await cluster.ask() == expected
    for node in cluster.nodes:
        node.new_engine()
    assert await cluster.ask(request_id="b") == expected
    peers, cluster.nodes[0].peers = cluster.nodes[0].peers, []
    assert cluster.nodes[0].get_current_shard(cluster.base_shard).end_layer == 4
    with pytest.raises(Exception, match="node2 is not in the cluster"):
        await cluster.ask(request_id="c")
    cluster.nodes[0].peers = peers
    back, cluster.nodes[1].peers = cluster.nodes[1].peers, []
    with pytest.raises(Exception, match="node2 does not see node1"):
        await cluster.ask(request_id="d")
    monkeypatch.setattr(legacy_node, "SEEN_S", 10.0)
    late = asyncio.create_task(cluster.ask(request_id="e"))
    await asyncio.sleep(0.05)
    cluster.nodes[1].peers = back
    assert await late == expected
    assert [len(cluster.loads(number)) for number in (1, 2)] == [1, 1]


async def test_other_layers_are_refused_while_the_plan_is_pinned(make: Any) -> None:
    cluster = make()
    with pytest.raises(Exception, match="the plan is pinned") as refused:
        await cluster.nodes[0].inference_engine.ensure_shard(cluster.fake.Shard(NAME, 0, 6, 7))
    assert "0 to 4 of 7" in str(refused.value)
    assert not cluster.stages[0].loaded


async def test_another_model_goes_to_exos_own_methods_and_ours_is_freed_first(make: Any, expected: list[int]) -> None:
    cluster = make()
    assert await cluster.ask() == expected
    node, stage = cluster.nodes[0], cluster.stages[0]
    other = cluster.fake.Shard(cluster.fake.OTHER, 0, 3, 4)
    output, state = await node.inference_engine.infer_tensor("o", other, np.array([[1]]))
    assert (output.shape, state, node.inference_engine.model) == ((1, 1, 3), None, "exo's own")
    assert not stage.loaded
    assert (await node.inference_engine.sample(output)).item() == 2
    assert node.get_current_shard(cluster.fake.Shard(cluster.fake.OTHER, 0, 0, 14)).end_layer == 10  # the plan's cut
    status = json.dumps({"type": "node_status", "status": "start_process_prompt", "shard": other.to_dict()})
    node.on_opaque_status.trigger_all("o", status)
    assert cluster.mains[0].seen == [status]
    api = node.modules["exo.api.chatgpt_api"]
    assert await api.resolve_tokenizer("org/other") == "exo's tokenizer of org/other"
    assert await cluster.ask(request_id="b") == expected
    assert len(cluster.loads(1)) == 2


async def test_a_tensor_lost_after_the_start_reaches_the_one_who_asked_by_name(
    make: Any, tiny: Path, tmp_path: Path, lose_tensor: Any
) -> None:
    copy = shutil.copytree(tiny, tmp_path / "copy")
    cluster = make(tiny, copy)
    lose_tensor(copy, copy, "model.layers.6.mlp.switch_mlp.down_proj.weight")
    with pytest.raises(ExoLoadError, match=r"node2: .*") as failed:
        await cluster.ask()
    assert "layers.6.mlp.switch_mlp.down_proj" in str(failed.value)
    assert not cluster.stages[1].loaded


async def test_a_peer_that_hangs_up_is_an_error_for_the_one_who_asked(make: Any, expected: list[int]) -> None:
    cluster = make()
    assert await cluster.ask() == expected
    cluster.nodes[0].peers[0].broken = True
    with pytest.raises(ExoLoadError, match="hung up"):
        await cluster.ask(request_id="b")
    cluster.nodes[0].peers[0].broken = False
    assert await cluster.ask(request_id="c") == expected


async def test_more_tokens_than_the_plan_has_room_for_are_refused(make: Any, tiny: Path) -> None:
    cluster = make()
    with pytest.raises(OverloadedError, match="longer than the plan"):
        await cluster.ask("the sea " * 8192)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offset": 7}, "does not follow"),
        ({"layer": 0}, "node of the plan was skipped"),
        ({"plan": "other"}, "different plans"),
    ],
)
async def test_a_tensor_out_of_place_is_refused(make: Any, change: dict[str, Any], message: str) -> None:
    cluster = make()
    stage, node = cluster.stages[1], cluster.nodes[1]
    place = {"plan": stage._digest, "offset": 0, "layer": 5, "more": False, **change}
    hidden = np.zeros((1, 3, 256), np.float32)
    await node.process_tensor(cluster.base_shard, hidden, "x", {"exo_kimi": place})
    assert any(message in line for line in cluster.said[1])
    assert any("failed on node2" in line and message in line for line in cluster.said[1]), (
        "the failure is said where it happened"
    )


async def test_hidden_states_of_another_form_are_refused(make: Any) -> None:
    cluster = make()
    place = {"plan": cluster.stages[1]._digest, "offset": 0, "layer": 5, "more": False}
    for number, (tensor, message) in enumerate(
        (
            (np.zeros((1, 3, 256), np.int64), "no hidden states"),
            (np.zeros((1, 3, 255), np.float32), "wrong size"),
            (np.zeros((3, 256), np.float32), "no hidden states"),
        )
    ):
        await cluster.nodes[1].process_tensor(cluster.base_shard, tensor, f"x{number}", {"exo_kimi": place})
        assert message in cluster.said[1][-1]
    first = {**place, "layer": 0}
    await cluster.nodes[0].process_tensor(cluster.base_shard, np.array([[999_999]]), "y", {"exo_kimi": first})
    assert "no token ids" in cluster.said[0][-1]


async def test_bfloat16_travels_as_its_bits(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy has no bfloat16; what leaves one stage is what arrives on the next."""
    import mlx.core as mx

    from exo_kimi.runtime.stage import resident

    cluster = make()
    own = resident.load_stage
    monkeypatch.setattr(
        resident, "load_stage", lambda manifest, **options: own(manifest, **{**options, "dtype": "bfloat16"})
    )
    for node in cluster.nodes:
        node.max_generate_tokens = 2
    assert len(await cluster.ask("a")) == 2
    assert {dtype for _, dtype in cluster.nodes[0].peers[0].sent} == {"uint16"}
    assert cluster.stages[0]._resident.model.layers[0].input_layernorm.weight.dtype == mx.bfloat16


async def test_callbacks_never_raise_into_exo(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    node = make().nodes[0]
    for status in ("{", "[]", '{"type": "node_status", "shard": 5}', '{"type": "exo_kimi_failed"}'):
        node.on_opaque_status.trigger_all("x", status)
    node.on_token.trigger_all("nobody", [], True)
    assert "could not be handled" in caplog.text


async def test_training_is_refused_by_name(make: Any) -> None:
    cluster = make()
    await cluster.nodes[0].inference_engine.ensure_shard(cluster.fake.Shard(NAME, 0, 4, 7))
    with pytest.raises(UnsupportedError, match="not train"):
        cluster.nodes[0].inference_engine.model.save_weights("x")


class TestAnExoThatDiffers:
    @pytest.fixture
    def modules(self, fake_legacy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
        made: dict[str, ModuleType] = fake_legacy.make_modules()
        for name, module in made.items():
            monkeypatch.setitem(sys.modules, name, module)
        return made

    def session(self, legacy_plan: Path, tiny: Path, said: list[str]) -> Any:
        setup = prepare_legacy(LegacyOptions(plan=legacy_plan, model=tiny, name=NAME), ["--node-id", "node1"])
        return launch._begin(setup, said.append)

    def test_is_left_as_it_is(self, modules: dict[str, ModuleType], legacy_plan: Path, tiny: Path) -> None:
        node = modules["exo.orchestration.node"].Node
        own = node.process_prompt

        async def forward_tensor(self: Any, base_shard: Any, tensor: Any) -> None:
            """Another signature."""

        node.forward_tensor = forward_tensor
        said: list[str] = []
        assert self.session(legacy_plan, tiny, said) is None
        assert any("Node.forward_tensor takes (self, base_shard, tensor), not" in line for line in said)
        assert "left as it is" in said[-1]
        assert node.process_prompt is own and NAME not in modules["exo.models"].model_cards

    def test_in_its_main_module_gets_everything_back(
        self, modules: dict[str, ModuleType], fake_legacy: Any, legacy_plan: Path, tiny: Path
    ) -> None:
        node = modules["exo.orchestration.node"].Node
        own, cards = node.process_prompt, dict(modules["exo.models"].model_cards)
        said: list[str] = []
        session = self.session(legacy_plan, tiny, said)
        assert node.process_prompt is not own
        main = fake_legacy.make_main(modules, "node1")
        del main.api
        session.attach(vars(main))
        assert node.process_prompt is own and modules["exo.models"].model_cards == cards
        assert "exo.main has no api" in said
        numpy_as_mx = modules["exo.networking.grpc.grpc_server"].mx
        assert not isinstance(numpy_as_mx.array, type)

    def test_with_a_model_of_our_name_asks_for_another(
        self, modules: dict[str, ModuleType], legacy_plan: Path, tiny: Path
    ) -> None:
        modules["exo.models"].model_cards[NAME] = {}
        with pytest.raises(UsageError, match="--name"):
            self.session(legacy_plan, tiny, [])

    def test_our_model_is_known_and_never_downloaded(
        self, modules: dict[str, ModuleType], legacy_plan: Path, tiny: Path
    ) -> None:
        self.session(legacy_plan, tiny, [])
        assert modules["exo.models"].model_cards[NAME]["layers"] == 7
        assert NAME not in modules["exo.download.new_shard_download"].get_supported_models([["mlx"]])

    async def test_main_gets_the_hosts_and_the_preload_that_were_asked_for(
        self, modules: dict[str, ModuleType], fake_legacy: Any, legacy_plan: Path, tiny: Path
    ) -> None:
        options = LegacyOptions(plan=legacy_plan, model=tiny, name=NAME, api_host="127.0.0.1", preload=True)
        said: list[str] = []
        session = launch._begin(prepare_legacy(options, ["--node-id", "node2"]), said.append)
        assert session is not None
        main = fake_legacy.make_main(modules, "node2")
        session.attach(vars(main))
        assert await main.api.run(port=7) == ("127.0.0.1", 7)
        await main.node.start(wait_for_peers=1)
        assert main.node.started == 1
        for _ in range(200):
            await asyncio.sleep(0.02)
            if session._stage.loaded:
                break
        assert session._stage.loaded
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()


class TestSetup:
    def test_arguments_are_completed_and_kept(self, legacy_plan: Path, tiny: Path) -> None:
        setup = prepare_legacy(LegacyOptions(plan=legacy_plan, model=tiny), ["--node-id=node2", "--node-port", "5"])
        assert setup.arguments[:3] == ("--node-id=node2", "--node-port", "5")
        assert setup.arguments[3:] == ("--inference-engine", "mlx", "--default-model", "tiny")
        assert setup.pinned.own.node_id == "node2" and setup.pinned.tokens == 8192
        with pytest.raises(UsageError, match="MLX engine"):
            prepare_legacy(
                LegacyOptions(plan=legacy_plan, model=tiny), ["--node-id", "node1", "--inference-engine", "tinygrad"]
            )
        with pytest.raises(UsageError, match="exo's arguments"):
            prepare_legacy(LegacyOptions(plan=legacy_plan, model=tiny), ["--node-id"])

    def test_only_this_nodes_layers_must_be_there(
        self, legacy_plan: Path, tiny: Path, tmp_path: Path, lose_tensor: Any
    ) -> None:
        lacking = tmp_path / "lacking"
        lose_tensor(tiny, lacking, "model.layers.6.input_layernorm.weight")
        options = LegacyOptions(plan=legacy_plan, model=lacking)
        assert prepare_legacy(options, ["--node-id", "node1"]).pinned.stage == 0
        with pytest.raises(CheckpointProblems, match=r"layers\.6\.input_layernorm"):
            prepare_legacy(options, ["--node-id", "node2"])

    def test_a_plan_of_another_model_is_refused(self, legacy_shapes: Any, tiny: Path, tmp_path: Path) -> None:
        path = tmp_path / "plan.json"
        legacy_shapes.plan_of_shape((30, 31), layers=61, width=7168).save(path)
        with pytest.raises(PlanMismatchError, match="another architecture"):
            prepare_legacy(LegacyOptions(plan=path, model=tiny), ["--node-id", "node1"])

    def test_a_plan_over_a_limit_is_refused_unless_forced(self, legacy_shapes: Any, tiny: Path, tmp_path: Path) -> None:
        plan, path = legacy_shapes.plan_of_shape(), tmp_path / "plan.json"
        replace(plan, stages=(replace(plan.stages[0], headroom_bytes=-3), *plan.stages[1:])).save(path)
        environment = {"EXO_KIMI_PLAN": str(path), "EXO_KIMI_MODEL": str(tiny)}
        with pytest.raises(PlanInfeasibleError, match=r"node1(.|\n)*\(3 bytes\)(.|\n)*--force"):
            prepare_legacy(LegacyOptions.from_environment(environment), ["--node-id", "node1"])
        forced = LegacyOptions.from_environment({**environment, "EXO_KIMI_FORCE": "1"})
        assert prepare_legacy(forced, ["--node-id", "node1"]).pinned.stage == 0

    def test_exos_own_download_is_the_default(
        self, legacy_plan: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("EXO_HOME", str(tmp_path))
        options = LegacyOptions(plan=legacy_plan)
        with pytest.raises(UsageError, match="--model DIR"):
            prepare_legacy(options, ["--node-id", "node1"])
        shutil.copytree(tiny, tmp_path / "downloads" / "tiny")
        assert prepare_legacy(options, ["--node-id", "node1"]).directory == tmp_path / "downloads" / "tiny"

    def test_the_environment_says_the_same(self) -> None:
        told = {
            "EXO_KIMI_PLAN": "p.json",
            "EXO_KIMI_MODEL": "dir",
            "EXO_KIMI_NODES": "a=b,c=d",
            "EXO_KIMI_PRELOAD": "1",
        }
        options = LegacyOptions.from_environment(told)
        assert options == LegacyOptions(plan=Path("p.json"), model=Path("dir"), nodes=["a=b", "c=d"], preload=True)
        assert not LegacyOptions.from_environment({"EXO_KIMI_PLAN": "p", "EXO_KIMI_PRELOAD": "0"}).preload

    def test_a_patched_exo_ends_with_one_message(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("EXO_KIMI_PLAN", str(tmp_path / "absent.json"))
        with pytest.raises(SystemExit, match=r"exo-kimi: cannot read the plan"):
            launch.begin()

    def test_no_legacy_exo_here(self, legacy_plan: Path, tiny: Path, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.setitem(sys.modules, "exo", None)
        with pytest.raises(ExoVersionError, match="no legacy exo"):
            launch.run(LegacyOptions(plan=legacy_plan, model=tiny), ["--node-id", "node1"])
        with pytest.raises(UsageError, match=r"exo/main\.py"):
            launch.run(LegacyOptions(plan=legacy_plan, model=tiny, source=tmp_path), ["--node-id", "node1"])

    def test_the_whole_start(
        self, fake_legacy: Any, legacy_plan: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        modules = fake_legacy.make_modules()
        main = fake_legacy.make_main(modules, "node1")
        started: list[list[str]] = []
        main.run = lambda: started.append(list(sys.argv))
        for name, module in {**modules, "exo.main": main}.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(sys, "argv", ["exo-kimi"])
        said: list[str] = []
        launch.run(LegacyOptions(plan=legacy_plan, model=tiny), ["--node-id", "node1"], say=said.append)
        assert started == [["exo", "--node-id", "node1", "--inference-engine", "mlx", "--default-model", "tiny"]]
        assert said[0] == "tiny by plan: node1 0:5, node2 5:7"

    def test_a_missing_loaders_name_is_given_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from exo_kimi.plugin.legacy.bindings import rename_loader

        utils = SimpleNamespace(load=len)
        monkeypatch.setitem(sys.modules, "mlx_lm.tokenizer_utils", utils)
        rename_loader()
        assert utils.load_tokenizer is len
