"""Kimi Delta Attention against mlx-lm's: peak and processor time of prefill, and the primitives of a decode step.

    exo-kimi bench kda [--rounds N] [--hidden 2304]

Every ratio is ours over theirs. `rule` is the gated delta rule alone, ours against mlx-lm's ops, `layer` the whole attention of a
layer. Peaks are beside weights and inputs; the time is the processor's, so that other work counts less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import mlx.core as mx
from mlx_lm.models.gated_delta import gated_delta_ops

from exo_kimi.bench.claims.kda.setup import DeltaLayers, arrays
from exo_kimi.bench.frame import Result, Row, finish, taken_in_turn
from exo_kimi.bench.setups.layers import relative_gap
from exo_kimi.bench.setups.primitives import primitives
from exo_kimi.models.kda.delta_rule import DeltaInputs, delta_rule

HEADS, HEAD_DIM = 32, 128
"""As published."""
HIDDEN = 128
"""2,304 as published: projections that both sides compute alike."""
TOKENS = 1024
PEAK_BAR, TIME_BAR, DECODE_BAR, EQUAL = 1 / 15, 0.75, 0.7, 1e-4
SHORT = 32
"""Tokens of the runs before those that count."""


@dataclass(frozen=True, slots=True)
class MeasuredPrefill:
    """Processor seconds, peak bytes beside what was held before, and outputs."""

    processor_s: float
    peak_bytes: int
    outputs: list[mx.array]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; the exit status."""
    parser = argparse.ArgumentParser(prog="exo-kimi bench kda", description="Kimi Delta Attention beside mlx-lm's")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs (default 3)")
    parser.add_argument("--hidden", type=int, default=HIDDEN, help=f"width of the layer (default {HIDDEN})")
    options = parser.parse_args(argv)
    layers = DeltaLayers.random(heads=HEADS, head_dim=HEAD_DIM, hidden=options.hidden)
    return finish(measure(layers, tokens=TOKENS, rounds=options.rounds), options)


def measure(layers: DeltaLayers, *, tokens: int, rounds: int) -> Result:
    """All rows."""
    linear = layers.ours
    rows = [*rule_rows(linear.heads, linear.dims, tokens, rounds), *layer_rows(layers, tokens, rounds)]
    rows.append(decode_row(layers))
    notes = [
        f"{linear.heads} heads of {linear.dims}, hidden {layers.config.hidden_size}, {tokens} tokens, float32; rule: without "
        "projections, convolutions and gates"
    ]
    return Result(bench="kda", against=f"mlx-lm {version('mlx-lm')}", rows=rows, notes=notes)


def rule_rows(heads: int, dims: int, tokens: int, rounds: int) -> list[Row]:
    """The rule on the same queries, keys, values and decays."""
    mx.random.seed(1)
    q, k, v, decays = (mx.random.normal((1, tokens, heads, dims)) for _ in range(4))
    q, k = (mx.fast.rms_norm(each, None, 1e-6) * scale for each, scale in ((q, 1 / dims), (k, dims**-0.5)))
    inputs = DeltaInputs(q, k, v, -mx.abs(decays) / 5, mx.sigmoid(mx.random.normal((1, tokens, heads))))
    state, decay = mx.zeros((1, heads, dims, dims)), mx.exp(inputs.g)
    mx.eval(q, k, v, inputs.g, inputs.beta, state, decay)

    def ours() -> list[mx.array]:
        return list(delta_rule(inputs, state))

    def theirs() -> list[mx.array]:
        return list(gated_delta_ops(q, k, v, decay, inputs.beta, state))

    return prefill_rows("rule", ours, theirs, rounds)


def layer_rows(layers: DeltaLayers, tokens: int, rounds: int) -> list[Row]:
    """A prompt through the layer, from an empty cache."""
    x = layers.tokens(tokens)

    def run(prefill: Callable[[mx.array], tuple[mx.array, Any]], x: mx.array = x) -> list[mx.array]:
        y, cache = prefill(x)
        return [y, arrays(cache)[-1]]

    for prefill in (layers.prefill_ours, layers.prefill_theirs):
        mx.eval(run(prefill, x[:SHORT]))  # what is made once
    return prefill_rows("layer", lambda: run(layers.prefill_ours), lambda: run(layers.prefill_theirs), rounds)


def prefill_rows(
    name: str, ours: Callable[[], list[mx.array]], theirs: Callable[[], list[mx.array]], rounds: int
) -> list[Row]:
    """Peak and time of runs taken in turn."""
    pairs = taken_in_turn(lambda: measured(ours), lambda: measured(theirs), rounds=rounds, warm=1)
    gap = max(gap_of(one.outputs, other.outputs) for one, other in pairs)
    peaks = [(float(one.peak_bytes), float(other.peak_bytes)) for one, other in pairs]
    times = [(one.processor_s, other.processor_s) for one, other in pairs]
    return [
        Row.of_pairs(
            f"{name}, peak",
            peaks,
            unit="bytes",
            bar=PEAK_BAR,
            direction="at most",
            inverse=True,
            equal=gap <= EQUAL,
            note=f"relative difference {gap:.0e}",
        ),
        Row.of_pairs(f"{name}, processor time", times, unit="s", bar=TIME_BAR, direction="at most", inverse=True),
    ]


def decode_row(layers: DeltaLayers) -> Row:
    """What one token after a short prompt takes, counted before it is evaluated."""
    x, prompt = layers.tokens(1), layers.tokens(3)
    (_, our_cache), (_, their_cache) = layers.prefill_ours(prompt), layers.prefill_theirs(prompt)
    mx.eval(arrays(our_cache), arrays(their_cache))
    mx.eval(layers.decode_ours(x, our_cache), layers.decode_theirs(x, their_cache))  # what is made once
    ours, theirs = layers.decode_ours(x, our_cache), layers.decode_theirs(x, their_cache)
    counts = [(float(sum(primitives(*ours).values())), float(sum(primitives(*theirs).values())))]
    gap = gap_of([ours[0], ours[-1]], [theirs[0], theirs[-1]])
    return Row.of_pairs(
        "decode of a token",
        counts,
        unit="primitives",
        bar=DECODE_BAR,
        direction="at most",
        inverse=True,
        equal=gap <= EQUAL,
        note=f"relative difference {gap:.0e}",
    )


def measured(run: Callable[[], list[mx.array]]) -> MeasuredPrefill:
    """Run it once, with MLX's buffer cache empty."""
    mx.clear_cache()
    before_bytes = mx.get_active_memory()
    mx.reset_peak_memory()
    started_s = time.process_time()
    outputs = run()
    mx.eval(outputs)
    return MeasuredPrefill(time.process_time() - started_s, mx.get_peak_memory() - before_bytes, outputs)


def gap_of(found: Sequence[mx.array], expected: Sequence[mx.array]) -> float:
    """The largest relative difference of arrays in pairs."""
    return max(relative_gap(one, other) for one, other in zip(found, expected, strict=True))
