"""Plans: the founding cluster, what does not fit, files that come back byte for byte, and other checkpoints refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import resolve
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import PlanError, PlanInfeasibleError, PlanMismatchError, UsageError
from exo_kimi.planner.answer import answer
from exo_kimi.planner.command import plan_answer
from exo_kimi.planner.matching import check_matches
from exo_kimi.planner.plan import Plan, read_plan
from exo_kimi.planner.question import Question
from exo_kimi.planner.search.search import best_split
from exo_kimi.planner.show.explain import explain
from exo_kimi.planner.show.golden import PLANS, golden, golden_files
from exo_kimi.planner.weights.recipes import recipe_names
from exo_kimi.planner.workload import OBJECTIVES
from tests.work import calls_of

GIB = 1 << 30
SHARD_PLANS = Path(__file__).parents[2] / "shard_plans"
FOUNDING = "m3-ultra-512, m2-ultra-192"
Ask = Callable[..., Question]


def explained(question: Question) -> str:
    """The explanation of its best split."""
    split = best_split(question)
    assert split is not None
    return explain(split)


def test_the_founding_split_is_found_within_the_default_limits(ask: Ask) -> None:
    question = ask("q34+q6", FOUNDING, context=40_960)
    assert f"{question.model.total_bytes / 1e9:.1f}" == "495.9"
    plan = answer(question).plan
    first, last = plan.stages
    assert plan.split == "44,17"
    assert (first.machine, first.start_layer, first.end_layer) == ("m3-ultra-512", 0, 44)
    assert (last.machine, last.start_layer, last.end_layer) == ("m2-ultra-192", 44, 61)
    assert first.need_bytes <= first.limit_bytes == 384 * GIB
    assert last.need_bytes <= last.limit_bytes == 144 * GIB
    assert last.need_bytes < 160e9
    assert first.wired_limit_mb is last.wired_limit_mb is None


def test_latency_gives_the_m3_ultra_more_and_says_how_little_that_gains(ask: Ask) -> None:
    question = ask("q34+q6", FOUNDING)
    plan = answer(replace(question, objective="latency")).plan
    assert plan.stages[0].machine == "m3-ultra-512"
    assert plan.stages[0].layers > 44
    gain = plan.prediction.decode_tokens_per_s / answer(question).plan.prediction.decode_tokens_per_s - 1
    assert 0 < gain < 0.01
    assert f"{gain:+.2%} decode, hardly a gain" in answer(question, explained=True).text


def test_official_int4_needs_both_limits_raised_and_cannot_be_44_17(ask: Ask) -> None:
    question = ask("int4", FOUNDING)
    with pytest.raises(PlanInfeasibleError) as caught:
        answer(question)
    text = str(caught.value)
    assert set(caught.value.short) == {"m3-ultra-512", "m2-ultra-192"}
    assert all(missing > 0 for missing in caught.value.short.values())
    assert sum(caught.value.short.values()) > question.model.total_bytes - 528 * GIB
    assert "46 on m3-ultra-512 / 15 on m2-ultra-192" in text
    assert "44,17 cannot be even so: m2-ultra-192 would be short by 18.97 GiB" in text
    plan = answer(question.with_raised_limits()).plan
    assert plan.split == "46,15"
    for stage in plan.stages:
        assert f"on {stage.machine}: {stage.sysctl}" in text
        assert stage.wired_limit_mb is not None
        assert stage.need_bytes <= stage.wired_limit_mb << 20 == stage.limit_bytes < stage.memory_bytes
    assert "above 90 % kernel panics have been reported" in text


def test_a_second_machine_is_said_not_to_make_a_small_k2_faster(ask: Ask) -> None:
    text = explained(ask("q3+q6", FOUNDING))
    assert "A second machine does not make decoding faster: m3-ultra-512 alone" in text
    assert "sudo sysctl iogpu.wired_limit_mb=450560" in text
    raised = explained(ask("q3+q6", FOUNDING, "latency").with_raised_limits())
    assert "A second machine does not make it faster: m3-ultra-512 holds the model alone" in raised
    assert "left out: m2-ultra-192" in raised


def test_tensor_parallel_is_recommended_only_where_it_wins(ask: Ask) -> None:
    assert "recommended for decode" in explained(ask("int4", "2x m3-ultra-512"))
    assert "not possible" in explained(ask("int4", FOUNDING, "latency").with_raised_limits())


def test_every_change_that_is_proposed_makes_it_fit(ask: Ask) -> None:
    """A context, a number of sequences, a recipe and a machine: each is tried by itself."""
    question = ask("q34+q6", FOUNDING, context=200_000, concurrency=4)
    with pytest.raises(PlanInfeasibleError) as caught:
        answer(question)
    changes = "\n".join(caught.value.changes)
    context = int(changes.split("--context ")[1].split()[0])
    concurrency = int(changes.split("--concurrency ")[1].split()[0])
    recipe = changes.split("a lighter recipe: ")[1].split()[0]
    machine = changes.split("one machine more: ")[1].split(",")[0]
    assert answer(ask("q34+q6", FOUNDING, context=context, concurrency=4))
    with pytest.raises(PlanInfeasibleError):
        answer(ask("q34+q6", FOUNDING, context=context + 256, concurrency=4))
    assert answer(question.with_workload(concurrency=concurrency))
    assert answer(replace(question, model=ask(recipe, FOUNDING).model))
    assert answer(replace(question, cluster=ask("q34+q6", f"{FOUNDING}, {machine}").cluster))
    assert answer(question.with_raised_limits())


def test_a_small_machine_is_told_how_many_more_it_takes() -> None:
    with pytest.raises(PlanInfeasibleError) as caught:
        plan_answer(model="kimi-k2.6", recipe="q3+q6", cluster="m1-max-64")
    (change,) = (change for change in caught.value.changes if "more:" in change)
    count, machine = change.split(" machines more: ")[0], change.split(": ")[1].split(",")[0]
    assert plan_answer(model="kimi-k2.6", recipe="q3+q6", cluster=f"m1-max-64, {count}x {machine}")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_plan_comes_back_byte_for_byte(ask: Ask, objective: Any, tmp_path: Path) -> None:
    plan = answer(ask("dq3_k_m-q8", FOUNDING, objective, concurrency=3)).plan
    plan.save(tmp_path / "plan.json")
    again = read_plan(tmp_path / "plan.json")
    assert again == plan
    assert again.to_json() == plan.to_json() == (tmp_path / "plan.json").read_text()
    assert plan.to_json() == json.dumps(json.loads(plan.to_json()), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


@cache
def golden_text() -> str:
    """The founding plan's file."""
    return golden("founding-q34-q6").plan.to_json()


def broken(change: Callable[[dict[str, Any]], object]) -> str:
    """A golden plan's text with one thing changed."""
    raw = json.loads(golden_text())
    change(raw)
    return json.dumps(raw)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[]", "version"),
        ("{", "JSON"),
        (broken(lambda raw: raw.update(version=1)), "version"),
        (broken(lambda raw: raw.pop("objective")), "wrong keys"),
        (broken(lambda raw: raw.update(extra=1)), "wrong keys"),
        (broken(lambda raw: raw.update(stages=3)), "not a list"),
        (broken(lambda raw: raw.update(objective="fast")), "objective"),
        (broken(lambda raw: raw.update(link="string")), "unknown link"),
        (broken(lambda raw: raw["stages"][0].update(end_layer=45)), "every layer once"),
        (broken(lambda raw: raw["stages"][0].update(end_layer=43)), "every layer once"),
        (broken(lambda raw: raw["stages"].pop()), "every layer once"),
        (broken(lambda raw: raw["stages"][0].update(end_layer="44")), "wrong type"),
        (broken(lambda raw: raw["stages"][0].update(end_layer=True)), "wrong type"),
        (broken(lambda raw: raw["model"].update(layers=60)), "every layer once"),
        (broken(lambda raw: raw.update(stages=[])), "every layer once"),
        (broken(lambda raw: raw.update(model=None)), "wrong keys"),
    ],
)
def test_a_malformed_plan_is_refused(text: str, word: str) -> None:
    with pytest.raises(PlanError, match=word):
        Plan.from_json(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 200) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None)
@given(value=JSON, seed=st.randoms(use_true_random=False))
def test_any_value_in_any_place_is_a_plan_or_a_named_error(value: object, seed: Any) -> None:
    raw = json.loads(golden_text())
    place: Any = raw
    while True:
        key = seed.choice(sorted(place) if isinstance(place, dict) else range(len(place)))
        if not isinstance(place[key], (dict, list)) or not place[key] or seed.random() < 0.2:
            place[key] = value
            break
        place = place[key]
    try:
        plan = Plan.from_json(json.dumps(raw))
    except PlanError:
        return
    assert Plan.from_json(plan.to_json()) == plan


def test_a_plan_for_another_checkpoint_is_refused(tmp_path: Path) -> None:
    own = make_tiny(tmp_path / "own")
    plan = plan_answer(directory=own, cluster="2x m1-max-64").plan
    check_matches(plan, resolve(open_index(own)))
    for name, options in (("bits", {"recipe": "uniform4"}), ("layers", {"config": {"num_hidden_layers": 8}})):
        other = make_tiny(tmp_path / name, **options)
        with pytest.raises(PlanMismatchError, match="another checkpoint"):
            check_matches(plan, resolve(open_index(other)))
    with pytest.raises(PlanMismatchError, match="architecture"):
        check_matches(golden("founding-int4").plan, resolve(open_index(own)))


def test_a_plan_from_a_recipe_takes_a_checkpoint_of_at_most_that_weight(tmp_path: Path) -> None:
    light, heavy = (make_tiny(tmp_path / name, recipe=name) for name in ("uniform3", "uniform8"))
    plan = plan_answer(directory=light, cluster="m1-max-64").plan
    plan = replace(plan, model=replace(plan.model, from_headers=False))
    check_matches(plan, resolve(open_index(light)))
    with pytest.raises(PlanMismatchError, match="heavier"):
        check_matches(plan, resolve(open_index(heavy)))


def test_golden_plans_are_made_again_byte_for_byte() -> None:
    made = golden_files()
    kept = {path.name: path.read_text(encoding="utf-8") for path in SHARD_PLANS.iterdir()}
    assert sorted(made) == sorted(kept)
    for name, text in made.items():
        assert kept[name] == text, f"{name}: run `python -m exo_kimi.planner.show.golden` and look at the difference"
    for name in PLANS:
        assert read_plan(SHARD_PLANS / f"{name}.json").model.layers == 61
    recipes = {recipe for _, recipe, cluster in PLANS.values() if "m2-ultra" in cluster}
    assert set(recipe_names()) - recipes == {"bf16", "mxfp4-experts"}  # the latter is K3's


def test_a_given_split_is_judged_and_not_changed() -> None:
    asked: dict[str, Any] = {"model": "kimi-k2.6", "recipe": "int4", "cluster": "m3-ultra-512, m2-ultra-192"}
    with pytest.raises(PlanInfeasibleError, match=r"m3-ultra-512(.|\n)*short by(.|\n)*m2-ultra-192(.|\n)*--force"):
        plan_answer(**asked, split=(44, 17))
    answer = plan_answer(**asked, split=(44, 17), force=True)
    assert answer.plan.split == "44,17"
    assert [stage.headroom_bytes < 0 for stage in answer.plan.stages] == [True, True]
    assert "m2-ultra-192  layers 44:61 (17)              186.97 GiB of 144.00 GiB, short by 42.97 GiB" in answer.text
    with pytest.raises(UsageError, match="61 layers"):
        plan_answer(model="kimi-k2.6", cluster="2x m3-ultra-512", split=(44, 16))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({}, "directory or --model"),
        ({"model": "kimi-k2.6", "directory": "x"}, "directory or --model"),
        ({"directory": "x", "recipe": "int4"}, "--recipe"),
        ({"model": "kimi-k2.6", "objective": "cheap"}, "objective"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        plan_answer(cluster="2x m3-ultra-512", **options)


def test_throughput_counts_on_one_sequence_per_machine() -> None:
    answer = plan_answer(model="kimi-k2.6", recipe="q3+q6", cluster="2x m3-ultra-512", objective="throughput")
    assert answer.plan.workload.concurrency == 2
    assert answer.plan.prediction.throughput_tokens_per_s > 1.5 * answer.plan.prediction.decode_tokens_per_s


def test_a_plan_is_little_work(ask: Ask) -> None:
    question = ask("q34+q6", FOUNDING)
    _, calls = calls_of(lambda: answer(question))
    assert calls < 40_000  # 17,000


@pytest.mark.parametrize(("kind", "link"), [("rdma", "jaccl"), ("thunderbolt5", "zmq"), ("ethernet10", "zmq")])
def test_hidden_states_go_over_rdma_where_every_link_was_priced_as_rdma(kind: str, link: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    machines = "".join(
        f'[[machine]]\nname = "{name}"\nchip = "m3-ultra"\nmemory = "512GiB"\n' for name in ("one", "other")
    )
    path.write_text(f'{machines}[[link]]\nbetween = ["one", "other"]\nkind = "{kind}"\n')
    plan = plan_answer(model="kimi-k2.6", recipe="int4", cluster=path).plan
    assert (len(plan.stages), plan.link) == (2, link)
