"""Kimi Linear against an oracle in NumPy, transformers and mlx-lm; and against itself, however it is fed and split."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from exo_kimi.arch.config import KimiConfig
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import UsageError
from exo_kimi.models import kimi_linear
from exo_kimi.models.kda.recurrent_cache import RecurrentCache
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.runtime.loading.loader import load

Floats = npt.NDArray[np.float64]
FAMILY = {"model_type": "kimi_linear"}
SMALL = {**FAMILY, "hidden_size": 128, "intermediate_size": 192, "moe_intermediate_size": 64, "vocab_size": 600}


def linear(full: list[int], layers: int, **numbers: int) -> dict[str, Any]:
    """`linear_attn_config` with latent attention in some layers, from 1."""
    others = [layer for layer in range(1, layers + 1) if layer not in full]
    sizes = {"head_dim": 32, "num_heads": 4, "short_conv_kernel_size": 4, **numbers}
    return {
        "num_hidden_layers": layers,
        "linear_attn_config": {**sizes, "full_attn_layers": full, "kda_layers": others},
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "as published": linear([4, 5], 5),
    "latent attention first": linear([1, 3], 4),
    "latent attention in the middle": linear([2], 3),
    "other heads and taps": linear([2], 4, num_heads=2, head_dim=64, short_conv_kernel_size=3),
    "2 of 4 groups, 2 shared experts": {
        **linear([2, 4], 4),
        "num_expert_group": 4,
        "topk_group": 2,
        "num_shared_experts": 2,
    },
    "q_lora, weights as they are, eps 1e-6": {
        **linear([3], 4),
        "q_lora_rank": 48,
        "moe_renormalize": False,
        "rms_norm_eps": 1e-6,
    },
}
LENGTHS = (1, 2, 65, 300)
BAR = 5e-5


def prompt(length: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.random.default_rng([seed, length]).integers(0, 600, length).astype(np.int32)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(
        tmp_path_factory.mktemp("linear"), layout="bf16", seed=3, config={**SMALL, **CONFIGS["as published"]}
    )


@pytest.fixture(scope="module")
def model(directory: Path) -> Model:
    return load(directory, dtype="float32")


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Any]:
    """Our model and that of transformers, which has Kimi Linear since 5.24."""
    torch = pytest.importorskip("torch", reason="the oracle runs on torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)  # tensors of this size, and other tests beside
    if not hasattr(transformers, "KimiLinearForCausalLM"):
        pytest.skip(f"transformers {transformers.__version__} has no Kimi Linear")
    config = {**SMALL, **CONFIGS[request.param]}
    directory = make_tiny(tmp_path_factory.mktemp("tiny"), layout="bf16", seed=3, config=config)
    theirs, info = transformers.KimiLinearForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return load(directory, dtype="float32"), theirs.eval()


def test_logits_are_those_of_transformers(pair: tuple[Model, Any]) -> None:
    import torch

    ours, theirs = pair
    for length in LENGTHS:
        ids = prompt(length)
        with torch.no_grad():
            expected = theirs(torch.tensor(ids, dtype=torch.int64)[None]).logits[0].numpy()
        found = np.array(ours(mx.array(ids)[None])[0])
        assert np.abs(found - expected).max() <= BAR * expected.std(), length


def test_32_greedy_tokens_are_those_of_transformers(pair: tuple[Model, Any]) -> None:
    import torch

    ours, theirs = pair
    ids = prompt(40)
    theirs_ids, past, step = [], None, torch.tensor(ids, dtype=torch.int64)[None]
    for _ in range(32):
        with torch.no_grad():
            output = theirs(step, cache=past, use_cache=True)
        past, step = output.cache, output.logits[:, -1].argmax(-1, keepdim=True)
        theirs_ids.append(int(step))
    assert greedy(ours, ids, 32) == theirs_ids


def greedy(model: Model, ids: np.ndarray[Any, Any], count: int) -> list[int]:
    caches, found, chunk = model.make_cache(), [], mx.array(ids)
    for _ in range(count):
        logits = model.logits(model.forward_ragged(chunk, [(len(chunk), caches)])[-1:])
        chunk = mx.argmax(logits, axis=-1)
        found.append(int(chunk.item()))
    return found


def test_logits_are_those_of_an_oracle_in_float64(model: Model) -> None:
    ids = prompt(40)
    expected = compute_slowly(model, ids)
    found = np.array(model(mx.array(ids)[None])[0])
    assert np.abs(found - expected).max() <= BAR * expected.std()


@pytest.mark.parametrize("layout", ["bf16", "mlx"])
def test_logits_are_those_of_mlx_lm(tmp_path: Path, layout: Any) -> None:
    """But for the norm of latents, to which mlx-lm adds rms_norm_eps in place of 1e-6: here both are 1e-6."""
    from mlx_lm.utils import load_model

    config = {**SMALL, **CONFIGS["as published"], "rms_norm_eps": 1e-6}
    # Without kv_b_proj: mlx-lm would pack its halves anew.
    options: dict[str, Any] = {"recipe": "uniform4", "absorbed": True} if layout == "mlx" else {}
    directory = make_tiny(tmp_path / "tiny", layout=layout, seed=3, config=config, **options)
    theirs, _ = load_model(directory)
    theirs.set_dtype(mx.float32)
    ours, ids = load(directory, dtype="float32"), mx.array(prompt(80))[None]
    found, expected = np.array(ours(ids)), np.array(theirs(ids))
    assert np.abs(found - expected).max() <= BAR * expected.std()


def test_the_norm_of_latents_adds_1e_6_whatever_rms_norm_eps_says(model: Model) -> None:
    assert model.args.rms_norm_eps == 1e-5
    assert model.layers[3].self_attn.kv_a_layernorm.eps == 1e-6


def test_the_correction_bias_takes_part_in_the_choice_alone(model: Model) -> None:
    router = model.layers[1].mlp.gate
    x = mx.random.normal((5, 128), key=mx.random.key(0))
    scores = mx.sigmoid(x @ router.weight.T)
    indices, weights = router(x)
    ranked = np.argsort(-np.array(scores + router.e_score_correction_bias), axis=-1)[:, :4]
    assert np.array_equal(np.sort(np.array(indices), axis=-1), np.sort(ranked, axis=-1))
    chosen = mx.take_along_axis(scores, indices, axis=-1)
    expected = chosen / chosen.sum(axis=-1, keepdims=True) * 2.446
    np.testing.assert_allclose(np.array(weights), np.array(expected), rtol=1e-5)


@pytest.mark.parametrize("sizes", [[60], [1] * 60, [7, 1, 30, 22], [59, 1], [3, 57], [16, 16, 28]], ids=str)
def test_chunks_of_any_size_give_the_logits_of_one_pass(model: Model, sizes: list[int]) -> None:
    ids = mx.array(prompt(60))
    chunks = mx.split(ids, np.cumsum(sizes)[:-1].tolist()) if len(sizes) > 1 else [ids]
    caches = model.make_cache()
    found = mx.concatenate([model.logits(model.forward_ragged(chunk, [(len(chunk), caches)])) for chunk in chunks])
    close(found, model(ids[None])[0])


@pytest.mark.parametrize("bounds", [[0, 5], [0, 2, 5], [0, 3, 4, 5], [0, 1, 2, 3, 4, 5]], ids=str)
def test_stages_of_one_kind_of_layer_or_both_give_what_one_does(
    directory: Path, model: Model, bounds: list[int]
) -> None:
    stages = [load(directory, start, end, dtype="float32") for start, end in itertools.pairwise(bounds)]
    caches = [stage.make_cache() for stage in stages]
    x = mx.array(prompt(50))
    expected = model(x[None])[0]
    found = []
    for chunk in (x[:33], x[33:34], x[34:]):
        h = chunk
        for stage, own in zip(stages, caches, strict=True):
            h = stage.forward_ragged(h, [(len(chunk), own)])
        found.append(stages[-1].logits(h))
    close(mx.concatenate(found), expected)


@pytest.mark.parametrize("scratch_bytes", [None, 1])
def test_several_sequences_of_any_length_are_each_what_they_are_alone(model: Model, scratch_bytes: int | None) -> None:
    lengths, chunks = [25, 1, 70, 3], [5, 1, 2, 70]
    batch, alone = ([model.make_cache() for _ in lengths] for _ in range(2))
    if scratch_bytes is not None:
        model.set_scratch_bytes(scratch_bytes)  # the pass is cut into pieces
    try:
        for sizes in (lengths, chunks):
            ids = [mx.array(prompt(size, seed=index)) for index, size in enumerate(sizes)]
            found = model.forward_ragged(mx.concatenate(ids), list(zip(sizes, batch, strict=True)))
            each = [model.forward_ragged(own, [(len(own), caches)]) for own, caches in zip(ids, alone, strict=True)]
            close(found, mx.concatenate(each))
    finally:
        model.set_scratch_bytes(512 * 1024**2)


def test_the_last_layer_takes_in_what_nobody_asks_for(tmp_path: Path) -> None:
    """A last layer of delta attention has a state to keep, where one of latent attention has keys and values."""
    directory = make_tiny(tmp_path / "tiny", layout="bf16", config={**SMALL, **linear([], 3)})
    model = load(directory, dtype="float32")
    ids = mx.array(prompt(60))
    whole, spared = model.make_cache(), model.make_cache()
    model.forward_ragged(ids[:40], [(40, whole)])
    model.forward_ragged(ids[:40], [(40, spared)], asked=[0])
    found, expected = (model.forward_ragged(ids[40:], [(20, caches)], asked=[1]) for caches in (spared, whole))
    close(model.logits(found[-1:]), model.logits(expected[-1:]))


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("layout", ["bf16", "mlx"])
def test_single_tokens_decode_as_the_layers_are_called(tmp_path: Path, sequences: int, layout: Any) -> None:
    """With projections fused, routers in float32 and one path for single tokens."""
    directory = make_tiny(tmp_path / "tiny", layout=layout, seed=1, config={**SMALL, **CONFIGS["as published"]})
    found = []
    for fuse in (True, False):
        model = load(directory, dtype="float32", fuse=fuse)
        caches = [model.make_cache() for _ in range(sequences)]
        for index, own in enumerate(caches):
            model.forward_ragged(mx.array(prompt(5 + index)), [(5 + index, own)])
        steps = [mx.array(prompt(sequences, seed=step)) for step in range(4)]
        assert model.takes_decode([(1, own) for own in caches]) is fuse
        found.append(
            mx.concatenate([model.logits(model.forward_ragged(ids, [(1, own) for own in caches])) for ids in steps])
        )
    close(found[0], found[1])


def test_a_decode_step_of_a_delta_layer_has_at_most_seven_tenths_of_mlx_lms_primitives(directory: Path) -> None:
    from mlx_lm.utils import load_model

    from exo_kimi.bench.setups.primitives import primitives
    from exo_kimi.models.decode import DecodeStep

    x = mx.random.normal((1, 1, 1, 128), key=mx.random.key(0))
    model = load(directory, dtype="float32", fuse=True)
    caches = model.make_cache()
    model.forward_ragged(mx.array([1, 2, 3]), [(3, caches)])
    mx.eval(x, [cache.state for cache in caches])
    step = DecodeStep(None, [3], mx.float32, chosen=4)
    attention = model.layers[1].self_attn
    mx.eval(attention.decode(x, step, [caches[1]]), *caches[1].state)  # makes operands once
    ours = sum(primitives(attention.decode(x, step, [caches[1]]), *caches[1].state).values())
    theirs, _ = load_model(directory)
    theirs.set_dtype(mx.float32)
    cache = theirs.make_cache()
    theirs(mx.array([[1, 2, 3]]), cache)
    mx.eval([part for each in cache for part in each.state if isinstance(part, mx.array)])
    out = theirs.layers[1].self_attn(x[0], None, cache[1])
    assert ours <= 0.7 * sum(primitives(out, *(part for part in cache[1].state if isinstance(part, mx.array))).values())


def test_a_state_is_float32_and_of_one_size(model: Model) -> None:
    caches = model.make_cache()
    linear = model.args.linear_attention
    assert linear is not None
    sizes = []
    for tokens in (3, 200, 5):
        model.forward_ragged(mx.array(prompt(tokens)), [(tokens, caches)])
        states = [cache for cache in caches if isinstance(cache, RecurrentCache)]
        assert [cache.recurrent_state.dtype for cache in states] == [mx.float32] * 3
        sizes.append(sum(cache.nbytes for cache in states))
    one = 3 * linear.state_bytes(bytes_per_element=4)
    assert sizes == [one, 2 * one, 2 * one]  # with the states before the newest pass


def test_a_snapshot_is_a_reference_that_later_tokens_leave_alone(model: Model) -> None:
    caches = model.make_cache()
    model.forward_ragged(mx.array(prompt(30)), [(30, caches)])
    snapshot = [cache.state for cache in caches[:3]]
    before = [np.array(part) for state in snapshot for part in state if part is not None]
    model.forward_ragged(mx.array(prompt(9)), [(9, caches)])
    after = [np.array(part) for state in snapshot for part in state if part is not None]
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))
    assert caches[0].trim(10) == 0 and not caches[0].is_trimmable()  # of the newest pass alone


def test_padded_batches_of_mlx_lm_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match="padded batches"):
        RecurrentCache.merge([RecurrentCache()])


def test_what_is_float32_stays_so_when_the_dtype_changes(directory: Path) -> None:
    model = load(directory, 0, 2)
    model.set_dtype(mx.bfloat16)
    attention = model.layers[0].self_attn
    assert {attention.A_log.dtype, attention.dt_bias.dtype, model.layers[1].mlp.gate.e_score_correction_bias.dtype} == {
        mx.float32
    }
    assert attention.q_proj.weight.dtype == mx.bfloat16
    assert bool(mx.isfinite(model(mx.array(prompt(9))[None]).astype(mx.float32)).all())


def test_mlx_lms_own_loader_fills_the_model_from_the_published_names(directory: Path, model: Model) -> None:
    weights: dict[str, mx.array] = {}
    for file in directory.glob("*.safetensors"):
        weights |= mx.load(str(file))
    other = kimi_linear.Model(KimiConfig.from_dict({**SMALL, **CONFIGS["as published"], **required()}))
    other.load_weights(list(other.sanitize(weights).items()))
    other.set_dtype(mx.float32)
    ids = mx.array(prompt(20))[None]
    close(other(ids), model(ids))


def required() -> dict[str, Any]:
    """The keys that a tiny checkpoint fills in."""
    from exo_kimi.checkpoint.tiny.config import text_config

    return {key: value for key, value in text_config(FAMILY, dtype="BF16").items() if key not in SMALL | linear([], 1)}


def close(found: mx.array, expected: mx.array) -> None:
    values = np.array(expected)
    np.testing.assert_allclose(np.array(found), values, atol=2e-5 * values.std() + 1e-5)


def compute_slowly(model: Model, ids: np.ndarray[Any, Any]) -> Floats:
    """Logits of one sequence, token by token in float64, from the equations and nothing else."""

    def w(module: Any) -> Floats:
        return np.array(module.weight.astype(mx.float32), np.float64)

    def norm(x: Floats, module: Any, eps: float) -> Floats:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w(module)

    def sigmoid(x: Floats) -> Floats:
        return 1 / (1 + np.exp(-x))

    def mlp(module: Any, x: Floats) -> Floats:
        gate = x @ w(module.gate_proj).T
        return (gate * sigmoid(gate) * (x @ w(module.up_proj).T)) @ w(module.down_proj).T

    def delta(attention: Any, x: Floats) -> Floats:
        heads, dims, length = attention.heads, attention.dims, len(x)

        def convolved(name: str) -> Floats:
            taps = w(attention[f"{name}_conv"].conv)[..., 0]
            u = x @ w(attention[f"{name}_proj"]).T
            past = np.concatenate([np.zeros((taps.shape[1] - 1, u.shape[1])), u])
            y = np.stack([(past[t : t + taps.shape[1]].T * taps).sum(-1) for t in range(length)])
            return (y * sigmoid(y)).reshape(length, heads, dims)

        q, k, v = map(convolved, "qkv")
        q, k = (each / np.sqrt((each**2).sum(-1, keepdims=True) + 1e-6) for each in (q, k))
        f = x @ w(attention.f_a_proj).T @ w(attention.f_b_proj).T + np.array(attention.dt_bias, np.float64)
        a_log = np.array(attention.A_log, np.float64).reshape(heads, 1)
        g = -np.exp(a_log) * np.log1p(np.exp(f)).reshape(length, heads, dims)
        beta = sigmoid(x @ w(attention.b_proj).T)
        state, out = np.zeros((heads, dims, dims)), np.zeros((length, heads, dims))
        for t in range(length):
            for head in range(heads):
                decayed = np.exp(g[t, head])[:, None] * state[head]
                wrong = v[t, head] - k[t, head] @ decayed
                state[head] = decayed + beta[t, head] * np.outer(k[t, head], wrong)
                out[t, head] = q[t, head] * dims**-0.5 @ state[head]
        gate = sigmoid(x @ w(attention.g_a_proj).T @ w(attention.g_b_proj).T).reshape(out.shape)
        return (norm(out, attention.o_norm, args.rms_norm_eps) * gate).reshape(length, -1) @ w(attention.o_proj).T

    def latent(attention: Any, x: Floats) -> Floats:
        heads, nope, rank = args.num_attention_heads, args.qk_nope_head_dim, args.kv_lora_rank
        q = (x @ w(attention.q_proj).T).reshape(len(x), heads, -1)
        down = x @ w(attention.kv_a_proj_with_mqa).T
        up = (norm(down[:, :rank], attention.kv_a_layernorm, 1e-6) @ w(attention.kv_b_proj).T).reshape(
            len(x), heads, -1
        )
        shared = np.repeat(down[:, None, rank:], heads, axis=1)  # no rotation
        keys, values = np.concatenate([up[..., :nope], shared], -1), up[..., nope:]
        scores = np.einsum("qhd,khd->hqk", q, keys) * q.shape[-1] ** -0.5
        scores = np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), values)
        return mixed.reshape(len(x), -1) @ w(attention.o_proj).T

    def mixture(moe: Any, x: Floats) -> Floats:
        scores = sigmoid(x @ w(moe.gate).T)
        biased = scores + np.array(moe.gate.e_score_correction_bias, np.float64)
        y = mlp(moe.shared_experts, x)
        gate, up, down = (w(getattr(moe.switch_mlp, f"{name}_proj")) for name in ("gate", "up", "down"))
        for t, row in enumerate(x):
            best = np.argsort(-biased[t])[: args.num_experts_per_tok]
            for expert in best:
                inner = gate[expert] @ row
                inner = inner * sigmoid(inner) * (up[expert] @ row)
                share = scores[t, expert] / scores[t, best].sum() * args.routed_scaling_factor
                y[t] += share * (down[expert] @ inner)
        return y

    args = model.args
    h = w(model.model.embed_tokens)[ids]
    for index, layer in enumerate(model.layers):
        x = norm(h, layer.input_layernorm, args.rms_norm_eps)
        h = h + (delta if args.is_linear(index) else latent)(layer.self_attn, x)
        x = norm(h, layer.post_attention_layernorm, args.rms_norm_eps)
        h = h + (mixture if args.is_moe(index) else mlp)(layer.mlp, x)
    logits: Floats = norm(h, model.model.norm, args.rms_norm_eps) @ w(model.lm_head).T
    return logits
