"""Every operation of MLX that the model uses, on this machine's default device, against numpy in float64.

On Metal in bf16; elsewhere in fp32, where bf16 products are an artefact of that backend. Inputs are rounded to the dtype before
both see them, so what differs is the operation. Errors are measured against the spread of the right answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from exo_kimi.models.ops import swiglu
from exo_kimi.owner.verify.check import CheckResult

Floats = npt.NDArray[np.float64]
Packed = tuple[mx.array, mx.array, mx.array]
"""Codes, scales and biases."""
BARS = {mx.bfloat16: 2e-2, mx.float32: 2e-4}
"""Of the greatest error by the standard deviation of the answer: some five roundings in bf16, whose step is 2**-8."""

MOVES = frozenset(
    "array arange zeros ones full stack concatenate split take pad repeat broadcast_to contiguous where take_along_axis "
    "put_along_axis inf eval async_eval compile finfo isfinite load random from_fp8 eye stop_gradient "
    "bfloat16 float16 float32 int32 uint8 uint16 uint32 int64 uint64 Dtype dtype bool_ floating issubdtype".split()
)
"""What only moves, makes or asks; arithmetic is what is compared. `load` and `from_fp8` are the loader's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """An operation with random inputs.

    Args:
        covers: names in `mlx.core` that it stands for.
        run: what was found and what is right; exactly right where `exact`.
    """

    covers: tuple[str, ...]
    run: Callable[[mx.Dtype], tuple[mx.array, Floats]]
    exact: bool = False


def verify_ops(operations: Mapping[str, Operation] | None = None) -> CheckResult:
    """Compare all of them; the worst of those that are not exact is told."""
    dtype = mx.bfloat16 if mx.metal.is_available() else mx.float32
    errors: dict[str, float] = {}
    wrong = []
    for name, operation in (OPERATIONS if operations is None else operations).items():
        found, right = operation.run(dtype)
        error = _error(np.array(found.astype(mx.float32), np.float64), right)
        errors[name] = error
        if not error <= (0.0 if operation.exact else BARS[dtype]):
            wrong.append(f"{name} (off by {error:.2g})")
    worst = max(errors, key=lambda name: errors[name])
    told = (
        f"wrong: {', '.join(wrong)}"
        if wrong
        else f"{len(errors)} operations; the worst is {worst}, {errors[worst]:.2g}"
    )
    return CheckResult.of(not wrong, told, dtype=str(dtype).rpartition(".")[2], errors=errors)


def _error(found: Floats, right: Floats) -> float:
    if found.shape != right.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - right).max() / max(float(right.std()), 1e-9))


def _normal(shape: tuple[int, ...], dtype: mx.Dtype, seed: int = 0) -> tuple[mx.array, Floats]:
    """Random numbers, and the same as numpy sees them after rounding."""
    made = mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype)
    return made, np.array(made.astype(mx.float32), np.float64)


def _packed(shape: tuple[int, ...], dtype: mx.Dtype, *, bits: int, group: int) -> tuple[Packed, Floats]:
    """Random codes with scales and biases, and what they mean, unpacked by numpy."""
    rng = np.random.default_rng(bits)
    columns = shape[-1]
    words = rng.integers(0, 2**32, (*shape[:-1], columns * bits // 32), dtype=np.uint32)
    scales, right_scales = _normal((*shape[:-1], columns // group), dtype, 1)
    biases, right_biases = _normal((*shape[:-1], columns // group), dtype, 2)
    as_bits = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little").reshape(*shape[:-1], columns, bits)
    codes = as_bits @ (1 << np.arange(bits))
    grouped = codes.reshape(*shape[:-1], columns // group, group)
    right = grouped * right_scales[..., None] + right_biases[..., None]
    return (mx.array(words), scales, biases), right.reshape(shape).astype(np.float64)


def _matmul(dtype: mx.Dtype) -> tuple[mx.array, Floats]:
    (a, x), (b, y) = _normal((33, 256), dtype), _normal((256, 65), dtype, 1)
    return a @ b, x @ y


def _addmm(dtype: mx.Dtype) -> tuple[mx.array, Floats]:
    (a, x), (b, y), (c, z) = _normal((3, 256), dtype), _normal((256, 65), dtype, 1), _normal((65,), dtype, 2)
    return mx.addmm(c, a, b), z + x @ y


def _quantized(bits: int, group: int, *, transpose: bool, tokens: int) -> Operation:
    def run(dtype: mx.Dtype) -> tuple[mx.array, Floats]:
        parts, weight = _packed((128, 256), dtype, bits=bits, group=group)
        x, right = _normal((tokens, 256 if transpose else 128), dtype)
        found = mx.quantized_matmul(x, *parts, transpose=transpose, group_size=group, bits=bits)
        return found, right @ (weight.T if transpose else weight)

    return Operation(covers=("quantized_matmul",), run=run)


def _experts(*, packed: bool, in_order: bool) -> Operation:
    def run(dtype: mx.Dtype) -> tuple[mx.array, Floats]:
        chosen = np.random.default_rng(3).integers(0, 4, 24)
        chosen = np.sort(chosen) if in_order else chosen
        x, right = _normal((24, 1, 128), dtype)
        indices = mx.array(chosen.astype(np.uint32))
        if packed:
            parts, weight = _packed((4, 64, 128), dtype, bits=4, group=64)
            quant: dict[str, Any] = {"group_size": 64, "bits": 4, "sorted_indices": in_order}
            found = mx.gather_qmm(x, *parts, rhs_indices=indices, **quant)
        else:
            plain, weight = _normal((4, 64, 128), dtype, 5)
            found = mx.gather_mm(x, plain.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=in_order)
        return found, np.einsum("nld,nod->nlo", right, weight[chosen])

    return Operation(covers=("gather_qmm" if packed else "gather_mm",), run=run)


def _dequantize(dtype: mx.Dtype) -> tuple[mx.array, Floats]:
    parts, right = _packed((16, 128), dtype, bits=8, group=64)
    return mx.dequantize(*parts, group_size=64, bits=8), right


def _quantize(dtype: mx.Dtype) -> tuple[mx.array, Floats]:
    """What 8 bits lose, against the most that they may: a step of each group, for MLX moves them so that zero is one of them."""
    x, right = _normal((16, 128), dtype)
    back = mx.dequantize(*mx.quantize(x, 64, 8), group_size=64, bits=8)
    found = np.array(back.astype(mx.float32), np.float64)
    groups = right.reshape(16, 2, 64)
    step = (groups.max(-1) - groups.min(-1)) / 255
    allowed = 1.01 * step + (2.0**-7 if dtype == mx.bfloat16 else 1e-6) * np.abs(groups).max(-1)
    good = (np.abs(found - right).reshape(16, 2, 64).max(-1) <= allowed).astype(np.float64)
    return mx.array(good.astype(np.float32)), np.ones((16, 2))


def _softmax(dtype: mx.Dtype) -> tuple[mx.array, Floats]:
    x, right = _normal((8, 300), dtype)
    exponents = np.exp(right - right.max(-1, keepdims=True))
    return mx.softmax(x, axis=-1, precise=True), exponents / exponents.sum(-1, keepdims=True)


def _pointwise(covers: str, run: Callable[[mx.array], mx.array], right: Callable[[Floats], Floats]) -> Operation:
    def both(dtype: mx.Dtype) -> tuple[mx.array, Floats]:
        x, y = _normal((8, 64), dtype)
        return run(x), right(y)

    return Operation(covers=(covers,), run=both)


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-x)))


def _swiglu(dtype: mx.Dtype) -> tuple[mx.array, Floats]:
    (a, x), (b, y) = _normal((8, 64), dtype), _normal((8, 64), dtype, 1)
    return swiglu(a, b), x * _sigmoid(x) * y


def _rms_norm(dtype: mx.Dtype) -> tuple[mx.array, Floats]:
    (a, x), (w, g) = _normal((8, 512), dtype), _normal((512,), dtype, 1)
    return mx.fast.rms_norm(a, w, 1e-6), x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * g


def _rope(dtype: mx.Dtype) -> tuple[mx.array, Floats]:
    width, offset = 64, 1000
    x, right = _normal((1, 4, 7, width), dtype)
    freqs = 10000.0 ** (np.arange(0, width, 2) / width)
    angles = (offset + np.arange(7))[:, None] / freqs
    even, odd = right[..., 0::2], right[..., 1::2]
    turned = np.empty_like(right)
    turned[..., 0::2] = even * np.cos(angles) - odd * np.sin(angles)
    turned[..., 1::2] = even * np.sin(angles) + odd * np.cos(angles)
    made = mx.array(freqs.astype(np.float32))
    return mx.fast.rope(x, width, traditional=True, base=None, scale=1.0, offset=offset, freqs=made), turned


def _attention(*, causal: bool, queries: int) -> Operation:
    def run(dtype: mx.Dtype) -> tuple[mx.array, Floats]:
        (q, a), (k, b), (v, c) = (_normal((1, 4, n, 64), dtype, n) for n in (queries, 40, 40))
        scores = a @ b.swapaxes(-1, -2) * 0.125
        if causal:
            allowed = np.arange(40)[None, :] <= np.arange(queries)[:, None] + 40 - queries
            scores = np.where(allowed, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        found = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.125, mask="causal" if causal else None)
        return found, weights / weights.sum(-1, keepdims=True) @ c

    return Operation(covers=("fast.scaled_dot_product_attention",), run=run)


def _ranked(covers: str, run: Callable[[mx.array], mx.array], right: Callable[[Floats], Floats]) -> Operation:
    """Over numbers that are all different in any dtype, so that there is one order."""

    def both(dtype: mx.Dtype) -> tuple[mx.array, Floats]:
        order = np.stack([np.random.default_rng(row).permutation(128) for row in range(8)]).astype(np.float32)
        return run(mx.array(order).astype(dtype)), right(order.astype(np.float64))

    return Operation(covers=(covers,), run=both, exact=True)


def _einsum(dtype: mx.Dtype) -> tuple[mx.array, Floats]:
    (a, x), (b, y) = _normal((3, 4, 32), dtype), _normal((3, 32, 5), dtype, 1)
    return mx.einsum("hqd,hdk->hqk", a, b), np.einsum("hqd,hdk->hqk", x, y)


OPERATIONS: Mapping[str, Operation] = {
    "matmul": Operation(covers=("matmul",), run=_matmul),
    "addmm": Operation(covers=("addmm",), run=_addmm),
    **{
        f"quantized_matmul {bits}-bit g{group}, {tokens} tokens": _quantized(bits, group, transpose=True, tokens=tokens)
        for bits, group in ((2, 64), (3, 64), (4, 32), (4, 64), (6, 64), (8, 64))
        for tokens in (1, 33)
    },
    "quantized_matmul 8-bit g64, not transposed": _quantized(8, 64, transpose=False, tokens=4),
    "gather_qmm, sorted": _experts(packed=True, in_order=True),
    "gather_qmm": _experts(packed=True, in_order=False),
    "gather_mm, sorted": _experts(packed=False, in_order=True),
    "gather_mm": _experts(packed=False, in_order=False),
    "dequantize": Operation(covers=("dequantize",), run=_dequantize),
    "quantize": Operation(covers=("quantize",), run=_quantize, exact=True),
    "softmax": Operation(covers=("softmax",), run=_softmax),
    "sigmoid": _pointwise("sigmoid", lambda x: mx.sigmoid(x), _sigmoid),
    "exp": _pointwise("exp", lambda x: mx.exp(x), np.exp),
    "sqrt": _pointwise("sqrt", lambda x: mx.sqrt(x * x + 1), lambda x: np.asarray(np.sqrt(x * x + 1))),
    "minimum": _pointwise("minimum", lambda x: mx.minimum(x, 0.5), lambda x: np.minimum(x, 0.5)),
    "cumsum": _pointwise("cumsum", lambda x: mx.cumsum(x, axis=-1), lambda x: np.cumsum(x, -1)),
    "tril": _pointwise("tril", lambda x: mx.tril(x, -1), lambda x: np.tril(x, -1)),
    "tanh": _pointwise("tanh", lambda x: mx.tanh(x), np.tanh),
    "rsqrt": _pointwise("rsqrt", lambda x: mx.rsqrt(x * x + 1), lambda x: np.asarray(1 / np.sqrt(x * x + 1))),
    "swiglu, compiled": Operation(covers=("compile",), run=_swiglu),
    "rms_norm": Operation(covers=("fast.rms_norm",), run=_rms_norm),
    "rope": Operation(covers=("fast.rope",), run=_rope),
    "attention, one query": _attention(causal=False, queries=1),
    "attention, causal": _attention(causal=True, queries=17),
    "argmax": _ranked("argmax", lambda x: mx.argmax(x, axis=-1), lambda x: np.argmax(x, -1).astype(np.float64)),
    "argsort": _ranked("argsort", lambda x: mx.argsort(x, axis=-1), lambda x: np.argsort(x, -1).astype(np.float64)),
    "argpartition": _ranked(
        "argpartition",
        lambda x: mx.sort(mx.argpartition(-x, kth=7, axis=-1)[..., :8], axis=-1),
        lambda x: np.sort(np.argsort(-x, -1)[..., :8], -1).astype(np.float64),
    ),
    "topk": _ranked("topk", lambda x: mx.sort(mx.topk(x, 8, axis=-1), axis=-1), lambda x: np.sort(x, -1)[..., -8:]),
    "einsum": Operation(covers=("einsum",), run=_einsum),
}
