"""The plan for a cluster as exo sees it, with what exo would have done alone beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exo_kimi.checkpoint.text_files import read_kimi_config
from exo_kimi.errors import ExoPlacementError, PlanInfeasibleError, UsageError
from exo_kimi.planner.weights.catalog import published_model
from exo_kimi.plugin.control.cluster import cluster_of_state, link_kind
from exo_kimi.plugin.control.plan import exo_plan, exo_scores_bytes

MODEL = "lab/kimi-k2-tiny"
GIB = 1 << 30


def founding(exo: Any, *free_gib: int) -> Any:
    for node, gib in zip(exo.nodes, free_gib, strict=True):
        node.free_bytes = gib * GIB
    return exo


def test_exo_alone_takes_one_machine_whose_limit_it_does_not_know(make_exo: Any, client_of: Any) -> None:
    """493 GB go into 500 GiB of free memory, of which the GPU may use 384."""
    state = client_of(founding(make_exo(), 500, 140)).state()
    made = exo_plan(state, "kimi-k2-instruct", recipe="founding", context=40960, our_engine=True)
    assert made.alone is not None
    assert [(stage.machine, stage.layers) for stage in made.alone.stages] == [("studio", 61)]
    assert "exo alone: studio 61 layers; studio is 90.22 GiB over its limit" in made.text
    assert all(stage.headroom_bytes >= 0 for stage in made.plan.stages) and len(made.plan.stages) == 2


def test_exos_split_moves_with_the_free_memory_and_ours_does_not(make_exo: Any, client_of: Any) -> None:
    made = [
        exo_plan(client_of(founding(make_exo(), *free)).state(), "kimi-k2-instruct", recipe="founding", our_engine=True)
        for free in ((430, 180), (430, 140))
    ]
    assert [[stage.layers for stage in each.alone.stages] for each in made if each.alone] == [[43, 18], [46, 15]]
    assert made[0].plan.to_json() == made[1].plan.to_json()


def test_exos_engine_is_told_its_scores_before_they_do_not_fit(make_exo: Any, client_of: Any) -> None:
    state = client_of(founding(make_exo(), 430, 180)).state()
    with pytest.raises(PlanInfeasibleError, match="--raise-limits"):
        exo_plan(state, "kimi-k2-instruct", recipe="founding", context=40960)
    raised = exo_plan(state, "kimi-k2-instruct", recipe="founding", context=40960, raise_limits=True)
    assert any(stage.sysctl for stage in raised.plan.stages)


def test_exos_engine_holds_the_ends_on_every_rank(make_exo: Any, client_of: Any, tiny: Path) -> None:
    state = client_of(make_exo()).state()
    plain = exo_plan(state, tiny, model_id=MODEL, context=4096, split=(2, 5), our_engine=True).plan
    own = exo_plan(state, tiny, model_id=MODEL, context=4096, split=(2, 5)).plan
    assert sum(stage.weight_bytes for stage in plain.stages) == plain.model.total_bytes
    more = sum(stage.weight_bytes for stage in own.stages) - own.model.total_bytes
    config = read_kimi_config(tiny)
    ends = 2 * config.vocab_size * config.hidden_size * 6.5 / 8  # both in 6 bits with F32 scales: a little more
    assert more > ends
    assert own.workload.ends_everywhere and not plain.workload.ends_everywhere


def test_exos_scores_grow_with_the_context_and_shrink_with_the_nodes() -> None:
    """64 heads, 2,048 tokens at once on two nodes, 131,072 cached: 34 GB a copy, two copies (reference/planning.md)."""
    config = published_model("kimi-k2-instruct").config
    assert exo_scores_bytes(config, 131072, 2) == 2 * 64 * 2048 * 131072 * 2
    assert exo_scores_bytes(config, 131072, 2) * 2 == exo_scores_bytes(config, 131072, 1)
    assert exo_scores_bytes(config, 131072, 4) == exo_scores_bytes(config, 131072, 8)


def test_the_plan_carries_exos_name_of_the_model(make_exo: Any, client_of: Any, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "lab--kimi-k2-here").symlink_to(tiny)
    state = client_of(make_exo()).state()
    assert exo_plan(state, tiny, model_id=MODEL, context=4096).plan.model.name == MODEL
    found = exo_plan(state, "lab/kimi-k2-here", models_dirs=[tmp_path], model_id=MODEL, context=4096)
    assert found.plan.model.from_headers


def test_an_id_that_exo_would_take_for_another_family_is_refused(make_exo: Any, client_of: Any, tiny: Path) -> None:
    state = client_of(make_exo()).state()
    with pytest.raises(UsageError, match=r"--model-id lab/kimi-k2-mine"):
        exo_plan(state, tiny, model_id="lab/mine", context=4096)


def test_a_split_of_other_layers_is_refused(make_exo: Any, client_of: Any, tiny: Path) -> None:
    state = client_of(make_exo()).state()
    for split in ((3, 3), (7, 0), (2, 2, 3)):
        with pytest.raises(UsageError, match="a split that these nodes cannot take"):
            exo_plan(state, tiny, model_id=MODEL, context=4096, split=split)


def test_known_chips_have_their_profiles_and_links_are_as_seen(make_exo: Any, client_of: Any) -> None:
    state = client_of(make_exo()).state()
    cluster = cluster_of_state(state)
    mini, studio = cluster.machines
    assert (mini.name, mini.bandwidth.number) == ("mini", 8.0e11)
    assert not studio.rdma, "exo reports no RDMA link"
    assert cluster.link(mini, studio).kind == "thunderbolt4"
    exo = make_exo()
    for node in exo.nodes:
        node.kind = "wifi"
    slow = client_of(exo).state()
    assert link_kind(*slow.nodes, slow) == "wifi"
    assert cluster_of_state(slow).link(mini, studio).kind == "wifi"


def test_an_unknown_chip_is_assumed_and_the_plan_says_so(make_exo: Any, client_of: Any, tiny: Path) -> None:
    exo = make_exo()
    exo.nodes[0].chip = "Unknown Chip"
    made = exo_plan(client_of(exo).state(), tiny, model_id=MODEL, context=4096, split=(2, 5))
    assert any("studio: memory bandwidth: no profile of Unknown Chip" in line for line in made.plan.assumptions)


def test_a_cluster_without_measured_nodes_is_no_cluster(make_exo: Any, client_of: Any) -> None:
    exo = make_exo()
    for node in exo.nodes:
        node.total_bytes = 0
    with pytest.raises(ExoPlacementError, match="has not measured any node"):
        cluster_of_state(client_of(exo).state())


@pytest.mark.parametrize("names", [("studio-m3", "studio-m2"), ("m3", "m2"), ("a", "b")])
def test_a_split_is_dealt_out_by_memory_whatever_the_nodes_are_called(
    make_exo: Any, client_of: Any, names: tuple[str, str]
) -> None:
    exo = make_exo()
    exo.nodes[0].name, exo.nodes[1].name = names
    asked: dict[str, Any] = {"recipe": "founding", "context": 8192, "our_engine": True}
    for nodes in (exo.nodes, exo.nodes[::-1]):
        exo.nodes = nodes
        plan = exo_plan(client_of(exo).state(), "kimi-k2-instruct", split=(44, 17), **asked).plan
        assert [(stage.machine, stage.layers) for stage in plan.stages] == [(names[0], 44), (names[1], 17)]


def test_a_split_that_does_not_fit_is_refused_unless_forced(make_exo: Any, client_of: Any) -> None:
    state = client_of(make_exo()).state()
    asked: dict[str, Any] = {"recipe": "founding", "context": 8192, "our_engine": True, "split": (44, 17)}
    with pytest.raises(PlanInfeasibleError, match=r"mini \(layers 0:44\)(.|\n)*short by(.|\n)*--force") as caught:
        exo_plan(state, "kimi-k2-instruct", nodes=["mini", "studio"], **asked)
    assert set(caught.value.short) == {"mini"}
    forced = exo_plan(state, "kimi-k2-instruct", nodes=["mini", "studio"], force=True, **asked).plan
    assert forced.stages[0].headroom_bytes == -caught.value.short["mini"]


def test_named_nodes_each_get_a_stage_in_their_order(make_exo: Any, client_of: Any, tiny: Path) -> None:
    """A toy fits one node; that two are asked for is how it is tried on two."""
    state = client_of(make_exo()).state()
    options: dict[str, Any] = {"model_id": MODEL, "context": 4096}
    assert len(exo_plan(state, tiny, **options).plan.stages) == 1
    for nodes in (["studio", "mini"], ["mini", "studio"], ["b" * 32, "a" * 32]):
        plan = exo_plan(state, tiny, nodes=nodes, **options).plan
        assert [stage.machine for stage in plan.stages] == [state.names.get(node, node) for node in nodes]
    for objective in ("latency", "ttft", "throughput"):
        plan = exo_plan(state, tiny, nodes=["mini", "studio"], objective=objective, **options).plan
        assert [stage.machine for stage in plan.stages] == ["mini", "studio"]
    assert exo_plan(state, tiny, nodes=["mini"], **options).plan.left_out == ()
    for wrong, word in ((["mini", "mini"], "mini is given twice"), (["moon"], "no node is named moon")):
        with pytest.raises(UsageError, match=word):
            exo_plan(state, tiny, nodes=wrong, **options)
