"""Single tokens through `decode` agree with the layers' calls, and fused projections with those apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from exo_kimi.arch.config import KimiConfig
from exo_kimi.bench.setups.primitives import dispatches
from exo_kimi.models.decode import LONGEST_RUN, MOST_MASK_BYTES, DecodeStep, mask_bytes
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.models.rope import Rope

PROMPTS = ([3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9])


def build(raw: dict[str, Any], *, bits: int | None = 4, absorbed: bool = False, **changes: Any) -> Model:
    mx.random.seed(0)
    model = Model(KimiConfig.from_dict({**raw, **changes}))
    for layer in model.layers:
        if absorbed:
            layer.self_attn.use_absorbed_modules()
    for path, value in tree_flatten(model.parameters()):
        if path.endswith(("layernorm.weight", "correction_bias")):
            value[:] = 1 + 0.2 * mx.random.normal(value.shape)
        elif path.endswith("gate.weight"):
            value[:] = 0.2 * mx.random.normal(value.shape)
    if bits is not None:
        nn.quantize(model, group_size=32, bits=bits, class_predicate=lambda _, module: hasattr(module, "to_quantized"))
    model.eval()
    mx.eval(model.parameters())
    return model


def decode(model: Model, sequences: int, steps: int = 3) -> list[mx.array]:
    """Logits of a few tokens of each sequence after its prompt."""
    caches = [model.make_cache() for _ in range(sequences)]
    for prompt, cache in zip(PROMPTS, caches, strict=False):
        mx.eval(model.forward_ragged(mx.array(prompt), [(len(prompt), cache)]))
    found = []
    for step in range(steps):
        tokens = mx.array([7 * step + 11 * index for index in range(sequences)])
        found.append(model.logits(model.forward_ragged(tokens, [(1, cache) for cache in caches])))
        mx.eval(found[-1])
    return found


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bits": None},
        {"absorbed": True},
        {"q_lora_rank": None},
        {"attention_bias": True},
        {"n_shared_experts": 0, "n_group": 2, "topk_group": 1},
        {"rope_scaling": None, "norm_topk_prob": False},
    ],
    ids=["kv_b", "plain", "absorbed", "no q_lora", "biases", "groups, none shared", "no yarn, not normalised"],
)
def test_the_decoder_agrees_with_the_layers(
    raw_config: dict[str, Any], changes: dict[str, Any], sequences: int
) -> None:
    expected = decode(build(raw_config, **changes), sequences)
    model = build(raw_config, **changes)
    model.fuse_projections()
    assert model.decodes
    for slow, fast in zip(expected, decode(model, sequences), strict=True):
        assert np.abs(np.array(slow - fast)).max() < 1e-4 * np.abs(np.array(slow)).max()


@pytest.mark.parametrize("piece_layers", [1, 2, 3])
def test_layers_begun_early_give_what_the_whole_graph_gives(raw_config: dict[str, Any], piece_layers: int) -> None:
    model = build(raw_config)
    model.fuse_projections()
    assert model.decodes and model.piece_layers > 0
    model.piece_layers = 0
    whole = decode(model, 3)
    model.piece_layers = piece_layers
    for expected, found in zip(whole, decode(model, 3), strict=True):
        np.testing.assert_array_equal(np.array(found), np.array(expected))


def test_a_prompt_is_the_same_through_fused_projections(raw_config: dict[str, Any], tokens: mx.array) -> None:
    model = build(raw_config)
    caches = model.make_cache()
    expected = model.forward_ragged(tokens, [(len(tokens), caches)])
    mx.eval(expected)
    model.fuse_projections()
    assert all(layer.mlp.switch_mlp.fused is not None for layer in model.layers[1:])
    found = model.forward_ragged(tokens, [(len(tokens), model.make_cache())])
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-4, atol=1e-4)


def test_fusing_keeps_every_parameter_and_its_memory(raw_config: dict[str, Any]) -> None:
    model = build(raw_config, n_routed_experts=64, moe_intermediate_size=64)
    before = {path: np.array(value) for path, value in tree_flatten(model.parameters())}
    held_bytes = mx.get_active_memory()
    model.fuse_projections()
    mx.clear_cache()
    assert mx.get_active_memory() <= 1.02 * held_bytes
    after = dict(tree_flatten(model.parameters()))
    assert after.keys() == before.keys()
    for path, value in before.items():
        np.testing.assert_array_equal(np.array(after[path]), value)


def test_projections_of_other_bits_stay_apart(raw_config: dict[str, Any]) -> None:
    model = build(raw_config, bits=None)
    nn.quantize(model, group_size=32, bits=4, class_predicate=lambda path, _: path.endswith("switch_mlp.gate_proj"))
    expected = decode(model, 2)
    model.fuse_projections()
    assert all(layer.mlp.switch_mlp.fused is None for layer in model.layers[1:])
    assert all(layer.mlp.shared_experts.fused is not None for layer in model.layers[1:])
    for slow, fast in zip(expected, decode(model, 2), strict=True):
        np.testing.assert_allclose(np.array(fast), np.array(slow), rtol=1e-4, atol=1e-4)


def test_bf16_weights_decode_as_the_layers_do(raw_config: dict[str, Any]) -> None:
    model = build(raw_config, bits=None)
    model.set_dtype(mx.bfloat16)
    expected = decode(model, 2)
    model.fuse_projections()
    assert all(layer.mlp.gate.weight.dtype == mx.float32 for layer in model.layers[1:])
    for slow, fast in zip(expected, decode(model, 2), strict=True):
        assert np.abs(np.array(slow - fast)).max() < 0.05 * np.abs(np.array(slow)).max()


def replaced(model: Model) -> None:
    """Other weights in the same modules: of norms, router, experts and, where they are, of both halves of kv_b_proj."""
    mx.random.seed(9)
    for path, value in tree_flatten(model.parameters()):
        module: Any = model
        *names, leaf = path.split(".")
        for name in names:
            module = module[int(name)] if name.isdigit() else module[name]
        if mx.issubdtype(value.dtype, mx.floating):
            module[leaf] = value * (1 + 0.1 * mx.random.normal(value.shape).astype(value.dtype))


@pytest.mark.parametrize("changes", [{}, {"bits": None}, {"absorbed": True}], ids=["kv_b", "plain", "absorbed"])
def test_replaced_weights_are_decoded_with_once_they_are_fused_again(
    raw_config: dict[str, Any], changes: dict[str, Any]
) -> None:
    slow, model = build(raw_config, **changes), build(raw_config, **changes)
    model.fuse_projections()
    before = decode(model, 2)
    for each in (slow, model):
        replaced(each)
    model.fuse_projections()
    expected = decode(slow, 2)
    assert not np.allclose(np.array(before[0]), np.array(expected[0]), atol=1e-3)
    for one, other in zip(expected, decode(model, 2), strict=True):
        np.testing.assert_allclose(np.array(other), np.array(one), rtol=1e-4, atol=1e-4)


def test_what_decoding_derives_of_weights_is_no_parameter_and_follows_them(raw_config: dict[str, Any]) -> None:
    model = build(raw_config)
    names = {path for path, _ in tree_flatten(model.parameters())}
    model.fuse_projections()
    decode(model, 2)
    assert {path for path, _ in tree_flatten(model.parameters())} == names
    norm = model.layers[0].input_layernorm
    x = mx.random.normal((2, 1, 1, model.args.hidden_size))
    step = DecodeStep(model.layers[0].self_attn.rope, [3, 4], x.dtype, chosen=2)
    for scale in (1.0, 3.0):
        norm.weight = mx.full(norm.weight.shape, scale)
        np.testing.assert_allclose(np.array(norm.decode(x, step)), np.array(norm(x)), rtol=1e-5)


def test_rotations_turn_as_the_oracle_does(config: KimiConfig, rotate: Callable[..., Any]) -> None:
    rope = Rope.of(config)
    positions = np.array([0, 1, 777, 4096])
    x = np.random.default_rng(0).standard_normal((4, 3, config.qk_rope_head_dim))
    found = x @ rope.matrices(positions)
    np.testing.assert_allclose(found, rotate(x, positions, config), atol=1e-3)


def test_a_step_has_few_primitives(raw_config: dict[str, Any]) -> None:
    from exo_kimi.bench.setups.primitives import primitives

    counts = []
    for fuse in (False, True):
        model = build(raw_config, absorbed=True)
        if fuse:
            model.fuse_projections()
        caches = model.make_cache()
        mx.eval(model.forward_ragged(mx.array([1, 2, 3]), [(3, caches)]))
        counts.append(sum(primitives(model.forward_ragged(mx.array([4]), [(1, caches)])).values()))
    assert counts[1] < 0.6 * counts[0]


def verify(model: Model, lengths: list[int], *, steps: int = 3) -> list[mx.array]:
    """Logits of steps of a few tokens of each sequence after its prompt, the last of them taken back each time."""
    caches = [model.make_cache() for _ in lengths]
    for prompt, cache in zip(PROMPTS, caches, strict=False):
        mx.eval(model.forward_ragged(mx.array(prompt), [(len(prompt), cache)]))
    found = []
    for step in range(steps):
        tokens = mx.array([7 * step + 11 * n for n in range(sum(lengths))])
        found.append(model.logits(model.forward_ragged(tokens, list(zip(lengths, caches, strict=True)))))
        mx.eval(found[-1])
        for length, cache in zip(lengths, caches, strict=True):
            for each in cache:
                each.trim(length // 2)
    return found


@pytest.mark.parametrize("lengths", [[4], [1, 3, 7]])
@pytest.mark.parametrize("kv_bits", [None, 8])
@pytest.mark.parametrize(
    "changes",
    [{}, {"bits": None}, {"absorbed": True}, {"q_lora_rank": None, "n_shared_experts": 0, "rope_scaling": None}],
    ids=["kv_b", "plain", "absorbed", "no q_lora, none shared, no yarn"],
)
def test_guesses_are_verified_as_the_layers_do(
    raw_config: dict[str, Any], changes: dict[str, Any], kv_bits: int | None, lengths: list[int]
) -> None:
    found = []
    for fuse in (False, True):
        widths = {"qk_rope_head_dim": 32} if kv_bits else {}
        model = build(raw_config, **changes, **widths)
        model.set_kv_bits(kv_bits)
        if fuse:
            model.fuse_projections()
        assert model.takes_decode([(n, model.make_cache()) for n in lengths]) == fuse
        found.append(verify(model, lengths))
    for slow, fast in zip(*found, strict=True):
        assert np.abs(np.array(slow - fast)).max() < 1e-4 * np.abs(np.array(slow)).max()


def test_guesses_in_bf16_and_float16_never_see_what_comes_after_them(raw_config: dict[str, Any]) -> None:
    for dtype in (mx.bfloat16, mx.float16):
        model = build(raw_config, bits=None)
        model.set_dtype(dtype)
        model.fuse_projections()
        found = []
        for last in (5, 6):
            caches = model.make_cache()
            mx.eval(model.forward_ragged(mx.array(PROMPTS[0]), [(5, caches)]))
            found.append(model.logits(model.forward_ragged(mx.array([1, 2, 3, last]), [(4, caches)])))
        np.testing.assert_array_equal(np.array(found[0][:3]), np.array(found[1][:3]))
        assert np.isfinite(np.array(found[0])).all() and not np.array_equal(*map(np.array, found))


def test_long_runs_and_masks_that_would_be_large_go_through_blocks(raw_config: dict[str, Any]) -> None:
    model = build(raw_config, bits=None)
    model.fuse_projections()
    caches = model.make_cache()
    assert model.takes_decode([(LONGEST_RUN, caches)]) and not model.takes_decode([(LONGEST_RUN + 1, caches)])
    row_bytes = mask_bytes([0], [1], heads=4, element_bytes=4)
    assert row_bytes == 0 and mask_bytes([98, 5], [2, 1], heads=4, element_bytes=4) == 2 * 100 * 4 * 4
    caches[0].offset = MOST_MASK_BYTES  # as of a sequence so long
    assert model.takes_decode([(1, caches)]) and not model.takes_decode([(2, caches)])


def test_a_step_with_guesses_launches_no_more_than_one_without(raw_config: dict[str, Any]) -> None:
    model = build(raw_config)
    model.fuse_projections()
    counts = []
    for length in (1, 2, 7):
        caches = model.make_cache()
        mx.eval(model.forward_ragged(mx.array([1, 2, 3]), [(3, caches)]))
        counts.append(dispatches(model.forward_ragged(mx.arange(length), [(length, caches)])))
    assert counts[0] == counts[1] == counts[2]
