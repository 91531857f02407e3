"""Experts from disk in a plan: slots, costs and bands, against the laws written out, and the founding documents' clusters."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import PlanInfeasibleError, PlanMismatchError, UsageError
from exo_kimi.planner import data
from exo_kimi.planner.command import plan_answer
from exo_kimi.planner.matching import check_matches
from exo_kimi.planner.plan import Plan
from exo_kimi.planner.question import Question
from exo_kimi.planner.search.cost import Placed, PlacedSplit
from exo_kimi.planner.search.search import best_split, fits, least_shortage
from exo_kimi.planner.search.solver import INFINITE
from exo_kimi.planner.search.tables import TICKS_PER_S, goal_for, least_need_table, slot_table, split_problem
from exo_kimi.planner.streaming import Streaming, default_curve, read_curve
from exo_kimi.planner.workload import OBJECTIVES

Cases = Callable[..., Question]
GIB = 1 << 30


def test_tables_of_streamed_ranges_hold_what_the_laws_say(random_case: Cases) -> None:
    random, streamed = Random(11), 0
    for number in range(200):
        question = random_case(random, OBJECTIVES[number % 4], streaming=True)
        machines = random.sample(question.machines, random.randint(1, min(len(question.machines), question.layers)))
        cuts = [0, *sorted(random.sample(range(1, question.layers), len(machines) - 1)), question.layers]
        stages = tuple(
            Placed(machine=machine, start_layer=start, end_layer=end)
            for machine, start, end in zip(machines, cuts, cuts[1:], strict=False)
        )
        split = PlacedSplit(question=question, stages=stages)
        problem = split_problem(question, stages=len(stages))
        order = [question.machines.index(machine) for machine in machines]
        for stage in stages:
            slots = int(slot_table(question, stage.machine)[stage.start_layer, stage.end_layer])
            assert (split.slots(stage) or 0) == slots
        costs = [int(problem.total[i, a, b]) for i, a, b in zip(order, cuts, cuts[1:], strict=False)]
        held = [question.held(stage.machine, stage.start_layer, stage.end_layer) for stage in stages]
        for stage, cost, need in zip(stages, costs, held, strict=True):
            assert (cost < INFINITE) == (need.total_bytes <= stage.machine.limit_bytes)
        if max(costs) >= INFINITE:
            continue
        peaks = [int(problem.peak[i, a, b]) for i, a, b in zip(order, cuts, cuts[1:], strict=False)]
        total = sum(costs)
        for one, other in itertools.pairwise(order):
            total += int(problem.hop_total[one, other])
            peaks.append(int(problem.hop_peak[one, other]))
        value = goal_for(question, stages=len(stages))(total, max(peaks))
        rounding_s = 30 * (question.workload.new_tokens + question.workload.chunks) / TICKS_PER_S
        assert value / TICKS_PER_S == pytest.approx(split.objective_s, abs=rounding_s)
        streamed += split.streams
    assert streamed > 30


def test_streaming_fits_more_and_is_chosen_only_where_it_is_faster(random_case: Cases) -> None:
    random, saved, chosen = Random(12), 0, 0
    for number in range(80):
        question = random_case(random, OBJECTIVES[number % 4], streaming=True)
        held, streamed = best_split(question.resident), best_split(question)
        assert fits(question) == (streamed is not None)
        assert (streamed is None) == bool(least_shortage(question))
        if held is None:
            saved += streamed is not None
            continue
        assert streamed is not None
        chosen += streamed.streams
        assert streamed.objective_s <= held.objective_s * (1 + len(streamed.stages) / 1000)
    assert saved > 10 and chosen > 0


def test_slots_fill_the_limit_and_never_pass_it(random_case: Cases) -> None:
    random = Random(13)
    for _ in range(60):
        question = random_case(random, streaming=True)
        machine = question.machines[0]
        slots, least = slot_table(question, machine), least_need_table(question, machine)
        for start in range(question.layers):
            for end in range(start + 1, question.layers + 1):
                count = question.slots(machine, start, end)
                assert (count or 0) == slots[start, end]
                if count is None:
                    continue
                need = question.need(start, end, count)
                assert need.total_bytes <= machine.limit_bytes < question.need(start, end).total_bytes
                assert machine.limit_bytes < question.need(start, end, count + 1).total_bytes
                assert least[start, end] == question.need(start, end, 1).total_bytes
                assert 1 <= count < question.model.config.n_routed_experts


def test_one_machine_costs_what_the_law_says_written_out(ask: Cases) -> None:
    """Decode: misses / SSD + bytes / memory bandwidth + arithmetic + overhead and read-back of 60 layers."""
    question = replace(
        ask("uniform-4", "m4-max-128", "latency", context=4096), streaming=Streaming(curve=default_curve())
    )
    split = best_split(question)
    assert split is not None
    machine, model = split.stages[0].machine, question.model
    slots = split.slots(split.stages[0])
    assert slots is not None and machine.ssd is not None
    rate = default_curve().at(slots / 384)
    expert = 3 * 7168 * 2048 * 4.5 / 8
    missed = 60 * 8 * expert * (1 - rate)
    held = replace(question.resident, cluster=replace(question.cluster, machines=(_huge(machine),)))
    plain = best_split(held)
    assert plain is not None
    expected_s = plain.prediction.tpot_s + missed / machine.ssd.number + 60 * 250e-6
    assert split.prediction.tpot_s == pytest.approx(expected_s, rel=1e-6)
    assert model.slot_bytes(0, 61) == pytest.approx(60 * expert, rel=1e-9)


def _huge(machine):  # type: ignore[no-untyped-def]
    return replace(machine, memory_bytes=1 << 40, limit=replace(machine.limit, number=1 << 40))


@pytest.mark.parametrize("context", [4096, 40_960])
@pytest.mark.parametrize(("memory", "least", "most"), [(64, 17, 25), (128, 50, 65)])
def test_slots_of_the_reference(memory: int, least: int, most: int, context: int) -> None:
    """K2 with a 6-bit rest: 19 to 25 slots in 64 GB, 50 to 65 in 128 GB. Source: reference/experts.md."""
    answer = plan_answer(
        model="kimi-k2.6", recipe="int4+q6", cluster=f"m4-max-{memory}", context=context, stream=True, prefill_chunk=512
    )
    slots = answer.plan.stages[0].expert_slots
    assert slots is not None
    assert least - 7 <= slots <= most


def test_the_published_curve_holds_every_published_point() -> None:
    curve = default_curve()
    points = data.load("published", "streaming")["point"]
    assert len(points) == 9
    for point in points:
        assert curve.at(point["share"], "slow") <= point["hit"] <= curve.at(point["share"], "fast"), point["source"]
    for share in (step / 64 for step in range(65)):
        assert share - 1e-12 <= curve.at(share, "slow") <= curve.at(share) <= curve.at(share, "fast") <= 1


def test_the_band_holds_the_published_speed() -> None:
    for speed in data.load("published", "streaming")["speed"]:
        keys = ("model", "recipe", "cluster", "context")
        made = plan_answer(**{key: speed[key] for key in keys}, stream=True).plan.prediction
        assert made.slow_tokens_per_s < speed["tokens_per_s"] < made.fast_tokens_per_s, speed["source"]


def test_a_band_is_a_point_where_nothing_is_streamed() -> None:
    plan = plan_answer(model="kimi-k2.6", recipe="q34+q6", cluster="m3-ultra-512, m2-ultra-192", stream=True).plan
    made = plan.prediction
    assert not plan.streams
    assert made.slow_tokens_per_s == made.decode_tokens_per_s == made.fast_tokens_per_s
    assert plan.workload.prefill_chunk == 512


def test_a_faster_disk_and_more_memory_bring_speed() -> None:
    speeds = [
        plan_answer(
            model="kimi-k2.6", recipe="q3+q6", cluster=cluster, stream=True, ssd_bytes_per_s=ssd
        ).plan.prediction
        for cluster, ssd in (("m3-ultra-96", 3e9), ("m3-ultra-96", 6e9), ("m3-ultra-256", 6e9))
    ]
    rates = [made.decode_tokens_per_s for made in speeds]
    assert rates == sorted(rates) and rates[0] < rates[1] < rates[2]
    assert all(made.slow_tokens_per_s < made.decode_tokens_per_s < made.fast_tokens_per_s for made in speeds)


def test_a_machine_without_a_known_disk_streams_nothing() -> None:
    with pytest.raises(PlanInfeasibleError, match="does not fit"):
        plan_answer(model="kimi-k2.6", recipe="q3+q6", cluster="m3-ultra-256", stream=True)
    with pytest.raises(PlanInfeasibleError, match="--stream --ssd SPEED"):
        plan_answer(model="kimi-k2.6", recipe="q3+q6", cluster="m3-ultra-256")
    with pytest.raises(PlanInfeasibleError, match=r"experts from disk: --stream, about \d"):
        plan_answer(model="kimi-k2.6", recipe="q3+q6", cluster="m4-max-128")


def test_the_founding_cluster_with_a_small_second_mac() -> None:
    """INT4 on 512 and 96 GB: nothing holds it; streamed it runs, fastest with both streaming a little."""
    cluster = "m3-ultra-512, m2-max-96"
    with pytest.raises(PlanInfeasibleError):
        plan_answer(model="kimi-k2.6", recipe="int4", cluster=cluster)
    answer = plan_answer(
        model="kimi-k2.6", recipe="int4", cluster=cluster, stream=True, ssd_bytes_per_s=5e9, explained=True
    )
    by_name = {stage.machine: stage for stage in answer.plan.stages}
    small, large = by_name["m2-max-96"], by_name["m3-ultra-512"]
    assert small.expert_slots is not None and 8 < small.expert_slots < 384
    assert large.layers > 4 * small.layers
    assert all(stage.need_bytes <= stage.limit_bytes for stage in answer.plan.stages)
    whole = plan_answer(
        model="kimi-k2.6", recipe="int4", cluster=cluster, stream=True, ssd_bytes_per_s=5e9, split="36,25"
    )
    assert whole.plan.stages[0].expert_slots is None, "the large Mac can hold its layers whole, which is slower"
    assert answer.plan.prediction.request_s < whole.plan.prediction.request_s
    assert "8.00 GiB more on m2-max-96" in answer.text
    assert "fastest of these:" in answer.text


def test_a_given_split_streams_too_and_is_refused_where_not_one_slot_fits() -> None:
    options: dict[str, Any] = {"model": "kimi-k2.6", "recipe": "int4", "stream": True, "ssd_bytes_per_s": 5e9}
    options["prefill_chunk"] = 512
    plan = plan_answer(cluster="m3-ultra-512, m2-max-96", split="36,25", **options).plan
    assert plan.split == "36,25"
    assert [stage.expert_slots is None for stage in plan.stages] == [True, False]
    with pytest.raises(PlanInfeasibleError, match="short by"):
        plan_answer(cluster="m4-32, m3-ultra-512", split="1,60", **options)


def test_official_int4_reads_a_tenth_less_than_it_holds(model_of: Callable[[str], object]) -> None:
    model = model_of("int4")
    assert sum(model.expert_disk_bytes) * 10 == sum(model.expert_bytes) * 9  # type: ignore[attr-defined]
    assert model_of("int4+q6").expert_disk_bytes == model_of("int4+q6").expert_bytes  # type: ignore[attr-defined]


def test_the_plan_file_carries_the_slots(tmp_path: Path) -> None:
    plan = plan_answer(model="kimi-k2.6", recipe="uniform-4", cluster="m4-max-128", stream=True).plan
    stage = plan.stages[0]
    assert stage.expert_slots is not None
    assert stage.expert_cache_bytes == stage.expert_slots * 60 * 384 * 3 * 7168 * 2048 * 9 // 16 // 384
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.workload.prefill_chunk > 512, "a chunk reads nearly every expert, so longer ones read less"


def test_a_streamed_plan_is_for_its_checkpoint(tmp_path: Path) -> None:
    """From a recipe, weights are compared without the experts, which the plan does not hold."""
    checkpoint = Checkpoint(make_tiny(tmp_path / "tiny", recipe="q34+q6"))
    cluster = tmp_path / "cluster.toml"
    asked: dict[str, Any] = {"directory": checkpoint.directory, "cluster": cluster, "context": 64, "reserve_bytes": 0}
    entry = '[[machine]]\nname = "a"\nchip = "m4-max"\nmemory = "36GiB"\nssd_bytes_per_s = 5e9\n'
    cluster.write_text(entry)
    whole = plan_answer(**asked).plan
    cluster.write_text(entry + f'limit = "{whole.stages[0].need_bytes - 500_000} B"\n')
    plan = plan_answer(**asked, stream=True).plan
    assert plan.stages[0].expert_slots is not None
    assert plan.stages[0].weight_bytes < whole.stages[0].weight_bytes
    check_matches(plan, checkpoint.manifest())
    recipe = replace(plan, model=replace(plan.model, from_headers=False))
    check_matches(recipe, checkpoint.manifest())
    heavier = replace(recipe, stages=(replace(recipe.stages[0], weight_bytes=recipe.stages[0].weight_bytes - 1),))
    with pytest.raises(PlanMismatchError, match="heavier"):
        check_matches(heavier, checkpoint.manifest())


def test_hit_rates_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "hits.toml"
    text = (
        'version = 1\nsource = "a chat"\npolicy = "lru"\nexperts = 384\nchosen = 8\ntokens = 1000\n'
        "slots = [32, 96, 384]\nlow = [0.2, 0.4, 1.0]\nhits = [0.3, 0.6, 1.0]\nhigh = [0.4, 0.7, 1.0]\n"
    )
    path.write_text(text)
    curve = read_curve(path)
    assert curve.measured
    assert (curve.at(32 / 384), curve.at(64 / 384), curve.at(96 / 384, "slow")) == pytest.approx((0.3, 0.45, 0.4))
    answer = plan_answer(
        model="kimi-k2.6", recipe="uniform-4", cluster="m4-max-128", stream=True, hits=path, explained=True
    )
    assert "hit rates: hits.toml: a chat, lru, 1000 tokens." in answer.text
    assert not any("hit rates" in text for text in answer.plan.assumptions)
    for wrong, message in (
        (text.replace("version = 1", "version = 2"), "version 2"),
        (text.replace("[32, 96, 384]", "[96, 32, 384]"), "ascending"),
        (text.replace("0.6, 1.0", "1.6, 1.0"), "between 0 and 1"),
        (text.replace("hits = [0.3, 0.6, 1.0]\n", ""), "no hits"),
        (text + "more = 1\n", "unknown key 'more'"),
        (text.replace("low = [0.2, 0.4, 1.0]", 'low = "no"'), "low is not a list"),
    ):
        path.write_text(wrong)
        with pytest.raises(UsageError, match=message):
            read_curve(path)


def test_options_that_say_how_to_stream_need_stream() -> None:
    with pytest.raises(UsageError, match="give --stream too"):
        plan_answer(model="kimi-k2.6", cluster="m4-max-128", ssd_bytes_per_s=5e9)


def test_a_plan_that_lacks_only_the_speed_of_a_disk_says_so() -> None:
    with pytest.raises(PlanInfeasibleError) as caught:
        plan_answer(model="kimi-k2.6", recipe="q34+q6", cluster="m3-ultra-256", stream=True)
    assert "the speed of a disk, which nobody has published of m3-ultra-256: --ssd 6GB/s" in str(caught.value)
    assert "m1-pro-32" not in str(caught.value), "a machine more is one that holds every expert with the others"
