"""The laws against what owners of Macs measured: held-out points within the bars, fitted constants fitted again."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import replace

import pytest

from exo_kimi.planner.machines.cluster import Cluster, link_of_kind, make_cluster
from exo_kimi.planner.machines.hardware import Machine, machine_of_name
from exo_kimi.planner.published.judge import (
    LONG_TOKENS,
    Measurement,
    groups,
    judge,
    judged_text,
    measurements,
    predicted_tokens_per_s,
)
from exo_kimi.planner.search.tensor import FIXED_S, tensor_decode_s


def held_out(kind: str) -> list[tuple[int, float]]:
    """Tokens and error of every held-out measurement of a kind."""
    return [
        (e.measurement.tokens, abs(e.error))
        for e in judge()
        if (e.measurement.use, e.measurement.kind) == ("held-out", kind)
    ]


def test_one_machine_decodes_as_measured_at_short_contexts() -> None:
    errors = [error for tokens, error in held_out("decode") if tokens < LONG_TOKENS]
    assert len(errors) >= 4
    assert statistics.median(errors) <= 0.05
    assert max(errors) <= 0.15


def test_one_machine_decodes_as_measured_at_long_contexts() -> None:
    errors = [error for tokens, error in held_out("decode") if tokens >= LONG_TOKENS]
    assert errors
    assert max(errors) <= 0.10


def test_prefill_from_1k_to_20k_takes_as_long_as_measured() -> None:
    found = held_out("prefill")
    assert min(tokens for tokens, _ in found) <= 1_024
    assert max(tokens for tokens, _ in found) >= 20_000
    assert max(error for _, error in found) <= 0.10


def test_a_measurement_is_fitted_to_or_judges_and_says_where_it_is_from() -> None:
    seen: dict[tuple[str, str, int], str] = {}
    for each in measurements():
        key = (each.series, each.kind, each.tokens)
        assert key not in seen
        seen[key] = each.use
        assert len(each.source) > 15
        assert bool(each.fits) == (each.use == "fit")
        assert bool(each.note) == (each.use == "not judged")
    assert {"fit", "held-out", "not judged"} == set(seen.values())


def fitted(constant: str) -> list[Measurement]:
    """The measurements that a constant was fitted to."""
    return [each for each in measurements() if each.fits == constant]


def with_machine(measurement: Measurement, change: Callable[[Machine], Machine]) -> Measurement:
    """A measurement on changed machines."""
    cluster = measurement.question.cluster
    changed = Cluster(machines=tuple(map(change, cluster.machines)), links=cluster.links)
    return replace(measurement, question=replace(measurement.question, cluster=changed))


def test_the_prefill_constant_is_the_one_that_fits_its_measurements_best() -> None:
    declared = machine_of_name("m3-ultra-512").prefill

    def deviation(flops: float) -> float:
        value = replace(declared, number=flops)
        moved = [
            with_machine(m, lambda machine: replace(machine, prefill=value)) for m in fitted("prefill_flops_per_s")
        ]
        return sum(math.log(predicted_tokens_per_s(m) / m.tokens_per_s) ** 2 for m in moved)

    # The sum of squares of logarithms has one valley.
    best = min((declared.number * factor for factor in (0.95, 0.988, 0.994, 1, 1.006, 1.012, 1.05)), key=deviation)
    assert declared.number == pytest.approx(best, rel=0.0061)


def test_the_overhead_is_what_its_measurement_leaves_over() -> None:
    (point,) = fitted("overhead_per_layer_s")
    declared = machine_of_name("m3-ultra-512").overhead
    bare = with_machine(point, lambda machine: replace(machine, overhead=replace(declared, number=0.0)))
    left_s = 1 / point.tokens_per_s - 1 / predicted_tokens_per_s(bare)
    assert declared.number == pytest.approx(left_s / 61, rel=0.01)


def test_the_handover_is_what_its_measurement_leaves_over() -> None:
    (point,) = fitted("handover_s")
    assert predicted_tokens_per_s(point) == pytest.approx(point.tokens_per_s, rel=0.005)
    assert {link_of_kind(kind).handover_s for kind in ("rdma", "thunderbolt5", "ethernet10", "wifi")} == {7.5e-3}


def test_tensor_parallel_s_constant_is_within_a_twentieth_of_what_each_of_its_measurements_leaves_over() -> None:
    for m in fitted("tensor.FIXED_S"):
        own_s = tensor_decode_s(m.question.model, m.question.machines, cached_tokens=m.tokens) - FIXED_S
        assert own_s + FIXED_S == pytest.approx(1 / m.tokens_per_s, rel=0.05)


def test_the_table_shows_each_measurement_its_use_and_the_medians() -> None:
    text = judged_text(judge())
    for each in measurements():
        assert each.series in text
    assert "fit: handover_s" in text
    assert "not judged: mlx-lm before #839" in text
    for group in groups(judge()):
        assert f"{group.median:.1%}" in text
    assert "no measurement is left to judge with" in text


def test_a_law_that_promises_too_much_is_seen() -> None:
    fast = machine_of_name("m3-ultra-512")
    fast = replace(fast, prefill=replace(fast.prefill, number=2 * fast.prefill.number))
    prefill = [m for m in measurements() if m.kind == "prefill" and m.use == "held-out"]
    moved = [replace(m, question=replace(m.question, cluster=make_cluster([fast]))) for m in prefill]
    assert min(each.error for each in judge(moved)) > 0.4
