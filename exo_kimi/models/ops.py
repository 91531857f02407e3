"""The seam to mlx and mlx-lm: the operations that differ between versions or devices.

Holds for mlx 0.31.2 with mlx-lm 0.31.3 (exo's) up to mlx 0.32.x with mlx-lm 0.32.x.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, ParamSpec

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import BatchKVCache, KVCache
from mlx_lm.models.mla import MultiLinear

from exo_kimi.models.adapters import dense_weight, is_plain

__all__ = [
    "CACHE_STEP",
    "SCRATCH_BYTES",
    "BatchKVCache",
    "KVCache",
    "MultiLinear",
    "append_to_cache",
    "attention_mask",
    "causal_mask",
    "compiled_on_gpu",
    "head_rows_matmul",
    "on_cpu",
    "rows_matmul",
    "scores_and_ranking",
    "shares",
    "swiglu",
    "turned",
]

CACHE_STEP: int = KVCache.step
"""Tokens by which the cache of one sequence grows."""

SCRATCH_BYTES = 512 * 1024**2
"""Most bytes of a pass beside weights and caches where nobody says otherwise."""

_CPU = mx.Device(mx.cpu)

Args = ParamSpec("Args")


def on_cpu() -> bool:
    """Whether operations run on the CPU backend by default."""
    return bool(mx.default_device() == _CPU)


def compiled_on_gpu(function: Callable[Args, Any], *, shapeless: bool = True) -> Callable[Args, Any]:
    """Fuse the element-wise operations of `function` on the GPU only: on Linux, mlx 0.31.2 compiles for the CPU by
    running g++, which a bare machine does not have. Unless `shapeless`, it is traced anew for each shape."""
    compiled = lru_cache(maxsize=1)(lambda: mx.compile(function, shapeless=shapeless))

    @wraps(function)
    def call(*args: Args.args, **kwargs: Args.kwargs) -> Any:
        return function(*args, **kwargs) if on_cpu() else compiled()(*args, **kwargs)

    return call


@compiled_on_gpu
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up."""
    return gate * mx.sigmoid(gate) * up


@compiled_on_gpu
def scores_and_ranking(logits: mx.array, bias: mx.array) -> tuple[mx.array, mx.array]:
    """sigmoid(logits), and the same plus a bias."""
    scores = mx.sigmoid(logits)
    return scores, scores + bias


@compiled_on_gpu
def shares(weights: mx.array, total: mx.array) -> mx.array:
    """weights / total, and 0 where every weight is."""
    return weights / (total + 1e-20)


def head_rows_matmul(x: mx.array, linear: nn.Module, rows: slice, *, heads: int, transpose: bool) -> mx.array:
    """Multiply each head with its own rows of one projection, plain or quantized, without unpacking it.

    The projection packs along its inputs, so a choice of rows is exact at any number of bits.

    Args:
        x: (heads, n, inputs) if `transpose`, else (heads, n, chosen rows).
        linear: nn.Linear or nn.QuantizedLinear with (heads * rows per head, inputs) weights.
        rows: the chosen rows within each head.
        transpose: multiply by the chosen rows' transpose, as a linear layer does.

    Returns:
        (heads, n, chosen rows) if `transpose`, else (heads, n, inputs).
    """

    return _chosen_matmul(
        x, linear, lambda tensor: tensor.reshape(heads, -1, tensor.shape[-1])[:, rows], transpose=transpose
    )


def rows_matmul(x: mx.array, module: nn.Module, rows: slice, *, transpose: bool) -> mx.array:
    """Multiply with some rows (of a linear layer) or some heads (of a MultiLinear) of a projection, plain or quantized."""
    return _chosen_matmul(x, module, lambda tensor: tensor[rows], transpose=transpose)


def _chosen_matmul(
    x: mx.array, module: nn.Module, choose: Callable[[mx.array], mx.array], *, transpose: bool
) -> mx.array:
    weight = choose(module.weight if is_plain(module) else dense_weight(module, x.dtype))
    if "scales" not in module:
        return x @ (turned(weight, rows=x.shape[-2]) if transpose else weight)
    biases = module.get("biases")
    return mx.quantized_matmul(
        x,
        weight,
        scales=choose(module.scales),
        biases=None if biases is None else choose(biases),
        transpose=transpose,
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
    )


def turned(x: mx.array, *, rows: int) -> mx.array:
    """x with its last two axes swapped, as the right side of a product with that many rows on its left.

    MLX's Linux wheels carry the reference BLAS, which takes half as long again when the right side is a view of its transpose,
    so there it is laid out anew when enough rows pay for it. On a GPU a view is as good.
    """
    view = x.swapaxes(-1, -2)
    return mx.contiguous(view) if rows >= 64 and on_cpu() else view


def know_cache(kind: type) -> None:
    """Let mlx-lm's `load_prompt_cache` find a cache of ours: it looks for classes among its own, by name."""
    setattr(mlx_lm_cache, kind.__name__, kind)


def append_to_cache(cache: Any, latent: mx.array, k_pe: mx.array) -> tuple[mx.array, mx.array]:
    """Add (B, 1, L, R) latents and (B, 1, L, rope) keys to a cache; return all of it, (B, 1, T, R) and (B, 1, T, rope).

    mlx-lm's KVCache grows by a step beyond its length, whatever that is; here it grows to a multiple of the step, so that
    admission can count a sequence as its length rounded up to CACHE_STEP.
    """
    if type(cache) is KVCache:
        held = 0 if cache.keys is None else cache.keys.shape[2]
        needed = cache.offset + latent.shape[2]
        if needed > held:
            more = -(-needed // CACHE_STEP) * CACHE_STEP - held
            cache.keys = _grown(cache.keys, latent, more)
            cache.values = _grown(cache.values, k_pe, more)
    keys, values = cache.update_and_fetch(latent, k_pe)
    return keys, values


def _grown(held: mx.array | None, new: mx.array, more: int) -> mx.array:
    room = mx.zeros((*new.shape[:2], more, new.shape[3]), new.dtype)
    return room if held is None else mx.concatenate([held, room], axis=2)


def attention_mask(h: mx.array, cache: Any) -> mx.array | str | None:
    """None (all visible), "causal", or a boolean array that broadcasts to (B, heads, L, T), as the cache asks.

    Args:
        h: (B, L, D) hidden states; only the shape matters.
        cache: an mlx-lm cache before this pass, or None.
    """
    mask: mx.array | str | None = create_attention_mask(h, cache)
    return mask


def causal_mask(queries: int, keys: int) -> mx.array:
    """(queries, keys) bool: the last query sees every key, the one before it all but one."""
    return mx.arange(keys - queries, keys)[:, None] >= mx.arange(keys)[None]
