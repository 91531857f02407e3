"""Where mlx-lm departs from Kimi Linear's definition, measured: its router in bf16, and the eps of its norm of latents."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.models.decode import DecodeStep
from exo_kimi.models.moe import Router
from exo_kimi.runtime.loading.loader import load

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[Any]
TOKENS, HIDDEN, EXPERTS, CHOSEN = 768, 128, 128, 8
TIE = 1e-6
"""Scores nearer to each other than this may rank either way in float32."""

CONFIG: dict[str, Any] = {
    "model_type": "kimi_linear",
    "hidden_size": HIDDEN,
    "intermediate_size": 192,
    "moe_intermediate_size": 64,
    "vocab_size": 600,
    "num_experts": EXPERTS,
    "num_experts_per_token": CHOSEN,
    "num_hidden_layers": 5,
    "rms_norm_eps": 1e-5,
    "linear_attn_config": {
        "head_dim": 32,
        "num_heads": 4,
        "short_conv_kernel_size": 4,
        "full_attn_layers": [4, 5],
        "kda_layers": [1, 2, 3],
    },
}


@pytest.mark.parametrize("layout", ["bf16", "mlx"])
def test_a_bf16_model_chooses_the_experts_of_float32_where_mlx_lms_router_does_not(
    tmp_path: Path, layout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer's routers are given what ours meets in bf16. Routers of mlx-community's layout (`mlx`) are in 8 bits: there
    float32 means of what they unpack to."""
    from mlx_lm.utils import load_model

    options: dict[str, Any] = {"recipe": "uniform4", "absorbed": True} if layout == "mlx" else {}
    directory = make_tiny(tmp_path / "tiny", layout=layout, seed=3, config=CONFIG, **options)
    ours, (theirs, _) = load(directory, dtype="bfloat16"), load_model(directory)
    met: dict[int, mx.array] = {}
    compute_logits = Router.logits

    def noted(router: Router, x: mx.array) -> mx.array:
        met[id(router)] = x
        return compute_logits(router, x)

    monkeypatch.setattr(Router, "logits", noted)
    chosen: dict[int, mx.array] = {}
    routers: dict[int, Router] = {layer: ours.layers[layer].mlp.gate for layer in range(1, 5)}
    for layer, router in routers.items():
        router.on_choice = partial(chosen.__setitem__, layer)
    mx.eval(ours(mx.array(np.random.default_rng(0).integers(0, 600, TOKENS))[None]), list(chosen.values()))
    for layer, router in routers.items():
        x, prompt_ids = met[id(router)], chosen[layer]
        assert x.dtype == mx.bfloat16 and x.shape == (TOKENS, HIDDEN)
        step = DecodeStep(None, [0] * TOKENS, mx.bfloat16, chosen=CHOSEN)
        decode_ids, _ = router.decode(x.reshape(TOKENS, 1, 1, HIDDEN), step)
        moe = theirs.layers[layer].mlp
        their_ids = chosen_by_mlx_lm(moe, x)
        exact, tied = rank_exactly(x, unpacked(moe.gate), moe.e_score_correction_bias)
        assert tied.sum() <= TOKENS // 100
        flips = [
            int((np.sort(np.array(ids).reshape(TOKENS, CHOSEN)) != exact).any(axis=-1)[~tied].sum())
            for ids in (prompt_ids, decode_ids, their_ids)
        ]
        print(f"{layout}, layer {layer}: of {TOKENS} tokens ours {flips[0]}, mlx-lm {flips[2]}, tied {tied.sum()}")
        assert flips[:2] == [0, 0]
        assert flips[2] >= TOKENS // 50


def chosen_by_mlx_lm(moe: Any, x: mx.array) -> mx.array:
    """The experts (N, K) to which its layer sends tokens (N, D)."""
    found: list[mx.array] = []

    def experts(x: mx.array, indices: mx.array) -> mx.array:
        found.append(indices)
        return mx.zeros((*indices.shape, HIDDEN), x.dtype)

    moe.switch_mlp = experts
    moe(x[None])
    return found[0][0]


def unpacked(gate: Any) -> mx.array:
    """(E, D) float32 of a router as mlx-lm holds it."""
    if "scales" not in gate:
        whole: mx.array = gate.weight.astype(mx.float32)
        return whole
    scales, biases = (gate[leaf].astype(mx.float32) for leaf in ("scales", "biases"))
    return mx.dequantize(gate.weight, scales, biases, gate.group_size, gate.bits)


def rank_exactly(x: mx.array, weight: mx.array, bias: mx.array) -> tuple[Ids, npt.NDArray[np.bool_]]:
    """The chosen experts (N, K) in float64, ascending, and (N,) whether the last of them is as good as the next one."""
    tokens, rows, shift = (np.array(each.astype(mx.float32), np.float64) for each in (x, weight, bias))
    scores: Floats = 1 / (1 + np.exp(-(tokens @ rows.T))) + shift
    order = np.argsort(-scores, axis=-1)
    last, after = (np.take_along_axis(scores, order[:, [rank]], axis=-1)[:, 0] for rank in (CHOSEN - 1, CHOSEN))
    return np.sort(order[:, :CHOSEN]), last - after < TIE


REST = 5e-5
"""Deviations of the logits that are no eps of latents: 3.8e-6 in mlx-lm 0.32.2, 4.1e-5 in 0.31.3 with the mlx of its day."""


@pytest.mark.parametrize(("factor", "least"), [(1.0, 1e-5), (0.01, 1e-2)])
def test_mlx_lm_departs_by_the_eps_of_its_norm_of_latents_and_by_little_else(
    tmp_path: Path, factor: float, least: float
) -> None:
    """In float32, `rms_norm_eps` 1e-5 as published: it adds that to the norm of latents, where transformers adds 1e-6. The
    smaller latents are, the more it matters: here as random weights make them, and a hundredth of that."""
    from mlx_lm.utils import load_model

    directory = make_tiny(tmp_path / "tiny", layout="bf16", seed=3, config={**CONFIG, "num_experts": 16})
    ours, (theirs, _) = load(directory, dtype="float32"), load_model(directory)
    theirs.set_dtype(mx.float32)
    attentions = [model.layers[layer].self_attn for model in (ours, theirs) for layer in (3, 4)]
    for attention in attentions:
        attention.kv_a_proj_with_mqa.weight = attention.kv_a_proj_with_mqa.weight * factor
    ids = mx.array(np.random.default_rng(1).integers(0, 600, 80))[None]
    expected = np.array(theirs(ids))
    departed = deviations(np.array(ours(ids)), expected)
    for attention in attentions[:2]:
        assert attention.kv_a_layernorm.eps == 1e-6
        attention.kv_a_layernorm.eps = 1e-5
    same = deviations(np.array(ours(ids)), expected)
    print(f"latents times {factor}: {departed:.1e} deviations of the logits; {same:.1e} where ours adds 1e-5 too")
    assert same <= REST
    assert departed >= max(least, same)


def deviations(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """The largest difference, in standard deviations of what is expected."""
    return float(np.abs(found - expected).max() / expected.std())
