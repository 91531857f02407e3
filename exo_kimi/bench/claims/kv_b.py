"""What each side adds to the error of a quantized kv_b_proj: mlx-lm dequantizes, splits, transposes and quantizes it again.

    exo-kimi bench kv-b

The figure is the root mean square of the difference of an attention layer's output from that of the exactly dequantized
weights, over the root mean square of that output. Ours over the bar; the rest of the layer is float32 and the same.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.deepseek_v3 import Model as TheirModel

from exo_kimi.bench.frame import Result, Row, finish
from exo_kimi.bench.setups.layers import Layers, layer_config

BITS = (3, 4, 6, 8)
BAR = 0.006
GROUP = 64
CACHED = 256
LENGTHS = (1, 16, 96)
"""Absorbed, absorbed, expanded."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; the exit status."""
    config = layer_config(heads=4, hidden=448, q_rank=96, rank=128)
    rows = []
    for bits in BITS:
        ours, theirs = added_errors(Layers.random(config), bits)
        rows.append(
            Row(
                name=f"{bits} bits",
                ours=ours,
                theirs=theirs,
                unit="relative",
                ratio=ours,
                bar=BAR,
                direction="at most",
                note=f"mlx-lm adds {theirs:.3f}",
            )
        )
    return finish(
        Result(
            bench="kv-b",
            against=f"mlx-lm {version('mlx-lm')}",
            rows=rows,
            notes=[f"4 heads of K2's widths, kv_lora 128, groups of {GROUP}, {CACHED} tokens cached, float32"],
        )
    )


def added_errors(layers: Layers, bits: int) -> tuple[float, float]:
    """Ours and theirs, both the worst over all lengths.

    Args:
        layers: plain ones; their kv_b_proj is quantized here.
        bits: of it.
    """
    packed = nn.QuantizedLinear.from_linear(layers.ours.kv_b_proj, GROUP, bits)
    prefix = "model.layers.0.self_attn."
    named = {f"{prefix}kv_b_proj.{leaf}": packed[leaf] for leaf in ("weight", "scales", "biases")}
    made = TheirModel.sanitize(SimpleNamespace(args=layers.theirs.config), named)
    nn.quantize(
        layers.theirs, GROUP, bits, class_predicate=lambda path, module: path.startswith(("embed_q", "unembed_out"))
    )
    layers.theirs.load_weights([(name.removeprefix(prefix), value) for name, value in made.items()], strict=False)
    exact = mx.dequantize(packed.weight, packed.scales, packed.biases, GROUP, bits)
    plain = layers.ours.kv_b_proj
    worst = [0.0, 0.0]
    for length in LENGTHS:
        contents, x = layers.contents(CACHED), layers.tokens(length)
        plain.weight = exact
        layers.ours.kv_b_proj = plain
        expected = layers.run_ours(x, layers.cache(contents, length))
        layers.ours.kv_b_proj = packed
        found = (
            layers.run_ours(x, layers.cache(contents, length)),
            layers.run_theirs(x, layers.cache(contents, length)),
        )
        for side, y in enumerate(found):
            gap = mx.sqrt(mx.mean((y - expected) ** 2) / mx.mean(expected**2))
            worst[side] = max(worst[side], float(gap))
    return worst[0], worst[1]


if __name__ == "__main__":
    sys.exit(main())
