"""The vision tower in a plan: its bytes on the first stage, and a plan without them refused by serve."""

from __future__ import annotations

from pathlib import Path

import pytest

from exo_kimi.arch.vision import KEPT_VECTORS
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.checkpoint.vision import NoVision, VisionManifest, find_vision
from exo_kimi.errors import PlanMismatchError, UsageError
from exo_kimi.planner.command import model_bytes, plan_answer
from exo_kimi.planner.machines.cluster import read_cluster
from exo_kimi.planner.matching import check_tower_planned
from exo_kimi.planner.question import Question
from exo_kimi.planner.search.compare import recipes
from exo_kimi.planner.search.tables import need_table
from exo_kimi.planner.weights.bytes import bytes_of_recipe
from exo_kimi.planner.weights.catalog import published_model
from exo_kimi.planner.weights.recipes import load_recipe
from exo_kimi.planner.workload import make_workload
from exo_kimi.runtime.cluster.cluster_plan import make_plan

CLUSTER = "m3-ultra-512, m2-ultra-192"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("seeing") / "tiny", vision=True, shards=1)


@pytest.fixture(scope="module")
def tower(directory: Path) -> VisionManifest:
    found = find_vision(Checkpoint(directory).index)
    assert isinstance(found, VisionManifest)
    return found


def test_the_first_stage_holds_the_tower_and_nobody_else(directory: Path, tower: VisionManifest) -> None:
    seeing, blind = model_bytes(directory=directory), model_bytes(directory=directory, no_vision=True)
    more = tower.resident_bytes + tower.kept_bytes
    assert seeing.vision_bytes == more > 0 == blind.vision_bytes
    assert seeing.weight_bytes(0, 4) - blind.weight_bytes(0, 4) == more
    assert seeing.weight_bytes(4, 7) == blind.weight_bytes(4, 7)


def test_every_range_of_the_search_counts_it_as_the_question_does(directory: Path) -> None:
    model = model_bytes(directory=directory)
    workload = make_workload(model.config, context=4096)
    question = Question(model=model, cluster=read_cluster(CLUSTER), workload=workload)
    table = need_table(question)
    for start, end in [(0, 1), (0, 4), (0, 7), (1, 7), (4, 7)]:
        assert table[start, end] == question.need(start, end).total_bytes


def test_a_plan_says_what_serve_then_loads(directory: Path, tower: VisionManifest) -> None:
    plan = plan_answer(directory=directory, cluster=CLUSTER, context=4096, split="4,3").plan
    served = make_plan(Checkpoint(directory), split="4,3", vision=tower)
    assert [stage.weight_bytes for stage in plan.stages] == [stage.resident_bytes for stage in served.stages]
    assert [stage.load.vision for stage in served.stages] == [True, False]


def test_serve_refuses_a_plan_that_has_no_room_for_the_tower(directory: Path, tower: VisionManifest) -> None:
    manifest = Checkpoint(directory).manifest()
    blind = plan_answer(directory=directory, cluster=CLUSTER, context=4096, split="4,3", no_vision=True).plan
    with pytest.raises(PlanMismatchError, match="no room for the vision tower"):
        check_tower_planned(blind, manifest, tower)
    check_tower_planned(blind, manifest, NoVision("a test"))
    check_tower_planned(
        plan_answer(directory=directory, cluster=CLUSTER, context=4096, split="4,3").plan, manifest, tower
    )


def test_a_published_model_that_takes_pictures_is_planned_with_its_tower() -> None:
    """The bytes are those of moonshotai/Kimi-K2.5's 335 tensors: 471.2 M parameters in bf16."""
    for name in ("kimi-k2.5", "kimi-k2.6", "kimi-k2.7-code"):
        config = published_model(name).vision
        assert config is not None and len(config.shapes) == 335
        assert 2 * config.parameters == pytest.approx(0.942e9, rel=1e-3)
        seeing, blind = model_bytes(model=name), model_bytes(model=name, no_vision=True)
        kept_bytes = KEPT_VECTORS * 7168 * 2
        assert seeing.vision_bytes == 2 * config.parameters + kept_bytes
        assert blind.vision_bytes == 0
        assert seeing.weight_bytes(0, 1) - blind.weight_bytes(0, 1) == seeing.vision_bytes
        assert seeing.weight_bytes(1, 61) == blind.weight_bytes(1, 61)
    for name in ("kimi-k2-instruct", "kimi-k2-thinking"):
        assert model_bytes(model=name).vision_bytes == 0


def test_other_recipes_of_an_answer_keep_the_tower() -> None:
    model = model_bytes(model="kimi-k2.5")
    question = Question(
        model=model, cluster=read_cluster("2x m3-ultra-512"), workload=make_workload(model.config, context=4096)
    )
    lighter = model.with_weights(bytes_of_recipe(model.config, load_recipe("q3+q6"), name="q3+q6"))
    assert lighter.vision_bytes == model.vision_bytes
    splits = [row.split for row in recipes(question) if row.split is not None]
    assert splits and all(split.question.model.vision_bytes == model.vision_bytes for split in splits)


def test_options_that_contradict_each_other_are_refused(directory: Path) -> None:
    with pytest.raises(UsageError, match="contradict"):
        plan_answer(directory=directory, cluster=CLUSTER, vision=directory, no_vision=True)
    with pytest.raises(UsageError, match="--vision is for DIR"):
        plan_answer(model="kimi-k2.5", cluster=CLUSTER, vision=directory)
