"""The cost laws against published speeds and against what must always hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exo_kimi.errors import UsageError
from exo_kimi.planner.question import Question
from exo_kimi.planner.search.cost import PlacedSplit, groups_and_batch, round_s, tpot_s, ttft_s
from exo_kimi.planner.search.laws import EXPERT_TILE_ROWS, attention_flops, chunk_flops
from exo_kimi.planner.search.tensor import tensor_options, tensor_tpot_s
from exo_kimi.planner.weights.bytes import ModelBytes
from exo_kimi.planner.workload import make_workload

ModelOf = Callable[[str], ModelBytes]
Ask = Callable[..., Question]

# exo with RDMA on M3 Ultra machines: model, active GB, machines, tokens/s. Source: reference/planning.md.
PUBLISHED = (
    ("Kimi-K2-Thinking", 34.3e9, 2, 21.6),
    ("Kimi-K2-Thinking", 34.3e9, 4, 28.3),
    ("Qwen3-235B 8-bit", 23.6e9, 1, 19.5),
    ("Qwen3-235B 8-bit", 23.6e9, 2, 26.2),
    ("Qwen3-235B 8-bit", 23.6e9, 4, 31.9),
    ("DeepSeek-V3.1 4-bit", 21.1e9, 1, 21.1),
    ("DeepSeek-V3.1 4-bit", 21.1e9, 2, 27.8),
    ("DeepSeek-V3.1 4-bit", 21.1e9, 4, 32.5),
)


@pytest.mark.parametrize(("model", "active_bytes", "machines", "published"), PUBLISHED)
def test_tensor_parallel_is_within_five_per_cent_of_every_published_point(
    model: str, active_bytes: float, machines: int, published: float
) -> None:
    assert 1 / tensor_tpot_s(active_bytes, 819e9, machines) == pytest.approx(published, rel=0.05), model


def test_flops_of_a_long_chunk_are_two_per_active_weight_and_tiles_that_experts_share(model_of: ModelOf) -> None:
    config = model_of("int4").config
    tokens = 1e9  # so that tiles do not matter
    weights = sum(chunk_flops(config, layer, tokens=tokens, keys=1).weights for layer in range(61)) / tokens
    kv_b = 61 * 64 * 256 * 512  # counted with attention, which expands or absorbs it
    assert weights / 2 == pytest.approx(31.7e9 - 1.174e9 - kv_b, rel=0.005)
    short, long = (chunk_flops(config, 5, tokens=count, keys=1).weights / count for count in (512, 2048))
    expert = 3 * 7168 * 2048
    assert short - long == pytest.approx(2 * expert * EXPERT_TILE_ROWS * (384 / 512 - 384 / 2048), rel=0.01)


def test_a_context_costs_what_was_measured_and_not_only_its_bytes(ask: Ask) -> None:
    """mlx-lm#839: 0.91 ms for 1,000 cached tokens of DeepSeek-V3, whose 128 heads are twice Kimi's."""
    question = ask("q3+q6", "m3-ultra-512")
    assert attention_flops(question.model.config, 0, 1) == 2 * 64 * (2 * 512 + 64)
    slope_s = tpot_s(whole(question), cached_tokens=101_000) - tpot_s(whole(question), cached_tokens=100_000)
    bytes_s = 1000 * 70_272 / 819e9
    assert (slope_s - bytes_s) * 2 + bytes_s == pytest.approx(0.91e-3, rel=0.02)


@pytest.mark.parametrize("objective", ["request", "latency", "throughput"])
def test_every_objective_that_decodes_pays_for_its_context(ask: Ask, objective: str) -> None:
    work = {"context": 131_072, "new_tokens": 512, "concurrency": 2 if objective == "throughput" else 1}
    short, long = (
        halves(ask("q3+q6", "2x m3-ultra-512", objective=objective, prompt_tokens=prompt, **work), 31)
        for prompt in (1024, 120_000)
    )
    slower_s = 119_000 * 61 * attention_flops(short.question.model.config, 0, 1) / 2.08e13
    if objective == "request":
        assert long.prediction.tpot_s - short.prediction.tpot_s > slower_s
    else:
        assert long.objective_s - short.objective_s > slower_s


def test_tensor_parallel_pays_for_its_context_too(ask: Ask) -> None:
    def tpot(prompt: int) -> float:
        return tensor_options(ask("q3+q6", "2x m3-ultra-512", context=131_072, prompt_tokens=prompt))[0].tpot_s

    arithmetic_s = 100_000 * 61 * 139_264 / 2 / 2.08e13
    read_s = 100_000 * 70_272 / 819e9  # the latent is one head, every machine reads all of it
    assert tpot(102_400) - tpot(2_400) == pytest.approx(arithmetic_s + read_s, rel=0.01)


def whole(question: Question) -> PlacedSplit:
    """All layers on the first machine."""
    return PlacedSplit.given(question, (61,), question.machines)


def halves(question: Question, cut: int) -> PlacedSplit:
    """The first two machines, cut at a layer."""
    return PlacedSplit.given(question, (cut, 61 - cut), question.machines)


@settings(deadline=None)
@given(cut=st.integers(1, 60))
def test_two_equal_machines_never_decode_one_sequence_faster_than_one(ask: Ask, cut: int) -> None:
    question = ask("q3+q6", "2x m3-ultra-512")
    one_s = tpot_s(whole(question))
    link = question.cluster.link(*question.machines)
    assert link.handover_s > 0
    assert tpot_s(halves(question, cut)) == pytest.approx(one_s + link.handover_s + link.transfer_s(14_336))


@settings(deadline=None)
@given(cut=st.integers(1, 60), concurrency=st.integers(1, 9))
def test_a_round_is_bound_by_the_slowest_stage_and_by_one_sequence_alone(ask: Ask, cut: int, concurrency: int) -> None:
    question = ask("q3+q6", "2x m3-ultra-512", concurrency=concurrency)
    groups, batch = groups_and_batch(2, concurrency)
    assert groups * batch >= concurrency
    assert groups <= 2
    alone = question.with_workload(concurrency=1)
    assert round_s(halves(question, cut)) >= tpot_s(halves(alone, cut)) * (1 - 1e-9)


def test_prefill_is_shared_and_the_even_cut_is_best(ask: Ask) -> None:
    question = ask("q3+q6", "2x m3-ultra-512")
    times = {cut: ttft_s(halves(question, cut)) for cut in range(1, 61)}
    assert min(times, key=lambda cut: times[cut]) in (30, 31)
    assert 0.5 < times[31] / ttft_s(whole(question)) < 0.6


@settings(deadline=None)
@given(chunk=st.integers(1, 5000), prompt=st.integers(1, 5000))
def test_a_single_chunk_is_not_pipelined(model_of: ModelOf, chunk: int, prompt: int) -> None:
    model = model_of("q3+q6")
    workload = make_workload(model.config, prompt_tokens=prompt, prefill_chunk=chunk)
    assert (workload.chunks - 1) * chunk < prompt <= workload.chunks * chunk


def test_tensor_parallel_is_offered_only_with_rdma_equal_memory_and_room(ask: Ask) -> None:
    def degrees(cluster: str) -> list[int]:
        return [len(option.machines) for option in tensor_options(ask("int4", cluster))]

    assert degrees("2x m3-ultra-512") == [2]
    assert degrees("4x m3-ultra-512") == [2, 4]
    assert degrees("2x m2-ultra-192") == []
    assert degrees("m3-ultra-512, m2-ultra-192") == []
    assert degrees("m3-ultra-512, m4-max-128") == []
    assert degrees("2x m3-ultra-256") == []


@pytest.mark.parametrize(
    "options",
    [
        {"context": 300_000},
        {"context": 1},
        {"context": 4096, "prompt_tokens": 4000, "new_tokens": 200},
        {"concurrency": 0},
        {"prefill_chunk": 0},
        {"reserve_bytes": -1},
    ],
)
def test_a_workload_that_cannot_be_is_refused(model_of: ModelOf, options: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        make_workload(model_of("int4").config, **options)


@settings(deadline=None)
@given(context=st.integers(2, 262_144))
def test_the_timed_request_fits_any_context(model_of: ModelOf, context: int) -> None:
    workload = make_workload(model_of("int4").config, context=context)
    assert workload.prompt_tokens >= 1
    assert workload.new_tokens >= 1
    assert workload.prompt_tokens + workload.new_tokens <= context <= workload.kv_tokens
