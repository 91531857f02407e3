"""The router decides in float32, with the bias for the choice only."""

from __future__ import annotations

import shutil
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from exo_kimi.arch.config import KimiConfig
from exo_kimi.models.moe import CompiledChoice, MoE, Router


def route_slowly(
    x: np.ndarray[Any, Any], weight: np.ndarray[Any, Any], bias: np.ndarray[Any, Any], config: KimiConfig
) -> list[dict[int, float]]:
    """Expert -> weight for each token, from sorting alone."""
    chosen = []
    for row in x.astype(np.float64):
        scores = 1 / (1 + np.exp(-(weight.astype(np.float64) @ row)))
        ranking = scores + bias
        groups = ranking.reshape(config.n_group, -1)
        best = np.argsort(-np.sort(groups, -1)[:, -2:].sum(-1))[: config.topk_group]
        allowed = [expert for expert in range(len(ranking)) if expert // groups.shape[1] in best]
        experts = sorted(allowed, key=lambda expert: -ranking[expert])[: config.num_experts_per_tok]
        total = sum(scores[expert] for expert in experts) if config.norm_topk_prob else 1.0
        chosen.append({expert: scores[expert] / total * config.routed_scaling_factor for expert in experts})
    return chosen


def build(raw: dict[str, Any], **changes: Any) -> tuple[Router, KimiConfig]:
    config = KimiConfig.from_dict({**raw, "n_routed_experts": 16, "num_experts_per_tok": 4, **changes})
    router = Router(config, config.n_routed_experts)
    mx.random.seed(1)
    router.weight = mx.random.normal(router.weight.shape) * 0.1
    router.e_score_correction_bias = mx.random.normal((16,)) * 0.2
    return router, config


@pytest.mark.parametrize(
    "changes",
    [{}, {"n_group": 4, "topk_group": 2}, {"n_group": 8, "topk_group": 3}, {"norm_topk_prob": False}],
    ids=["one group", "2 of 4 groups", "3 of 8 groups", "weights not normalised"],
)
def test_the_router_agrees_with_sorting(raw_config: dict[str, Any], changes: dict[str, Any]) -> None:
    router, config = build(raw_config, **changes)
    x = mx.random.normal((50, config.hidden_size))
    indices, weights = router(x)
    expected = route_slowly(np.array(x), np.array(router.weight), np.array(router.e_score_correction_bias), config)
    for row, experts in enumerate(expected):
        found = dict(zip(indices[row].tolist(), weights[row].tolist(), strict=True))
        assert found == pytest.approx(experts, rel=1e-4)


@pytest.mark.skipif(
    shutil.which("g++") is None and not mx.metal.is_available(), reason="MLX compiles for the CPU with g++"
)
def test_compiled_choosing_is_choosing(raw_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    router, config = build(raw_config, n_group=4, topk_group=2)
    logits = [mx.random.normal((tokens, 1, 1, config.n_routed_experts)) for tokens in (1, 3)]
    expected = [router.choose(each, router.e_score_correction_bias) for each in logits]
    mx.eval(expected)
    monkeypatch.setattr("exo_kimi.models.ops.on_cpu", lambda: False)  # as on a GPU
    for each, (experts, weights) in zip(logits, expected, strict=True):
        found = CompiledChoice(router.choose)(each, router.e_score_correction_bias)
        assert mx.array_equal(found[0], experts)
        np.testing.assert_allclose(np.array(found[1]), np.array(weights), rtol=1e-6)


def test_the_bias_changes_the_choice_and_never_the_weights(raw_config: dict[str, Any]) -> None:
    router, config = build(raw_config, norm_topk_prob=False)
    x = mx.random.normal((1, config.hidden_size))
    router.e_score_correction_bias = mx.where(mx.arange(16) == 11, 100.0, router.e_score_correction_bias)
    indices, weights = router(x)
    found = dict(zip(indices[0].tolist(), weights[0].tolist(), strict=True))
    score = mx.sigmoid(x[0] @ router.weight[11]).item()
    assert found[11] == pytest.approx(score * config.routed_scaling_factor, rel=1e-5)


def test_a_bf16_router_picks_the_experts_that_float32_would(raw_config: dict[str, Any]) -> None:
    router, config = build(raw_config)
    router.weight = router.weight.astype(mx.bfloat16)
    x = mx.random.normal((400, config.hidden_size)).astype(mx.bfloat16)
    indices, weights = router(x)
    assert weights.dtype == mx.float32
    expected = route_slowly(
        np.array(x.astype(mx.float32)),
        np.array(router.weight.astype(mx.float32)),
        np.array(router.e_score_correction_bias),
        config,
    )
    assert [set(row) for row in indices.tolist()] == [set(experts) for experts in expected]


def test_experts_and_the_shared_expert_add_up(config: KimiConfig) -> None:
    mx.random.seed(0)
    moe = MoE(config, config.n_routed_experts)
    moe.gate.weight = mx.random.normal(moe.gate.weight.shape)
    x = mx.random.normal((6, config.hidden_size))
    indices, weights = moe.gate(x)
    each = moe.switch_mlp(x, indices)
    expected = moe.shared_experts(x)
    for slot in range(config.num_experts_per_tok):
        expected = expected + weights[:, slot, None] * each[:, slot]
    np.testing.assert_allclose(np.array(moe(x)), np.array(expected), atol=1e-5)
