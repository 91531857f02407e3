"""The cost laws against published speeds and against what must always hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exo_kimi.errors import UsageError
from exo_kimi.planner.question import Question
from exo_kimi.planner.search.cost import PlacedSplit, groups_and_batch, layer_flops, round_s, tpot_s, ttft_s
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


@pytest.mark.parametrize(("recipe", "published"), [("q3+q6", 21.1), ("dq3_k_m-q8", 21.1)])
def test_one_m3_ultra_decodes_about_as_published_for_k26(ask: Ask, recipe: str, published: float) -> None:
    """mlx-lm, K2.6 at 3.58 bits, one M3 Ultra: 21.1 tokens/s, 221.7 tokens/s of prefill. Its recipe is between these."""
    promise = whole(ask(recipe, "m3-ultra-512")).prediction
    assert promise.decode_tokens_per_s == pytest.approx(published, rel=0.05)
    assert 4096 / promise.ttft_s == pytest.approx(221.7, rel=0.06)


def test_flops_of_a_token_are_two_per_active_weight(model_of: ModelOf) -> None:
    model = model_of("int4")
    assert sum(layer_flops(model, layer, 0) for layer in range(61)) / 2 == pytest.approx(31.7e9 - 1.174e9, rel=0.005)


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
    hop_s = question.cluster.link(*question.machines).transfer_s(14_336)
    assert tpot_s(halves(question, cut)) == pytest.approx(one_s + hop_s)


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
