"""One K2-shaped attention layer over a cache of 2,048 tokens, against mlx-lm's on the same weights and cache contents.

    exo-kimi bench attention [--heads 64] [--hidden 896] [--lengths 1,2,...] [--rounds 1]

Ratios are mlx-lm's time over ours. K2's 64 heads are measured, in two minutes, but an eighth of its hidden_size: what is more
goes into projections, which both sides compute alike (`--hidden 7168` has all of them). `bench all` leaves out 4 and 512 new
tokens, which take half of the time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version

import mlx.core as mx

from exo_kimi.arch.scratch import AttentionShape
from exo_kimi.bench.frame import Result, Row, finish, taken_in_turn
from exo_kimi.bench.setups.layers import Layers, layer_config, relative_gap
from exo_kimi.models.ops import KVCache

CACHED = 2048
EQUAL = 1e-4
BARS = {1: 1 / 1.05, 2: 35.0, 4: 1 / 1.05, 8: 10.0, 32: 2.5, 128: 1 / 1.05, 512: 1 / 1.05}
K2_PROJECTIONS = 7168 * 1536 + 1536 * 64 * 192 + 7168 * 576 + 64 * 128 * 7168


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; the exit status."""
    parser = argparse.ArgumentParser(prog="exo-kimi bench attention", description="one attention layer by cost")
    parser.add_argument("--heads", type=int, default=64, help="of K2's 64 (default all)")
    parser.add_argument("--hidden", type=int, default=896, help="hidden_size (default 896, an eighth of K2's)")
    parser.add_argument(
        "--lengths",
        type=_lengths,
        default=",".join(map(str, BARS)),
        metavar="L,L,...",
        help=f"new tokens, some of {', '.join(map(str, BARS))} (default all)",
    )
    parser.add_argument("--rounds", type=int, default=1, help="pairs of runs per length (default 1)")
    options = parser.parse_args(argv)
    layers = Layers.random(layer_config(heads=options.heads, hidden=options.hidden, q_rank=24 * options.heads))
    rows = [measure(layers, length, options.rounds) for length in options.lengths]
    counted = ", ".join(f"L={length} {_counted(length):.3g}" for length in options.lengths)
    return finish(
        Result(
            bench="attention",
            against=f"mlx-lm {version('mlx-lm')} DeepseekV3Attention",
            rows=rows,
            notes=[
                f"{options.heads} heads, hidden {options.hidden}, q_lora {24 * options.heads}, kv_lora 512; "
                f"{CACHED} tokens cached; float32",
                "a whole K2 layer has 92.7M weights of projections beside, which both sides read alike; multiplications "
                f"of theirs over ours with them: {counted}",
            ],
        ),
        options,
    )


def measure(layers: Layers, length: int, rounds: int) -> Row:
    """One length; the outputs that are compared are those that were timed. A single token is repeated, for it is soon over."""
    contents, x = layers.contents(CACHED), layers.tokens(length)
    outputs: dict[str, mx.array] = {}

    def timed(side: str, run: Callable[[mx.array, KVCache], mx.array]) -> float:
        cache = layers.cache(contents, length)
        started_s = time.perf_counter()
        outputs[side] = run(x, cache)
        return time.perf_counter() - started_s

    pairs = taken_in_turn(
        lambda: timed("ours", layers.run_ours),
        lambda: timed("theirs", layers.run_theirs),
        rounds=20 * rounds if length == 1 else rounds,
        warm=0,
    )
    gap = relative_gap(outputs["ours"], outputs["theirs"])
    return Row.of_pairs(
        f"L={length}", pairs, unit="s", bar=BARS[length], equal=gap <= EQUAL, note=f"relative difference {gap:.0e}"
    )


def _lengths(text: str) -> list[int]:
    lengths = [int(part) for part in text.split(",")]
    if unknown := [length for length in lengths if length not in BARS]:
        raise argparse.ArgumentTypeError(f"no bar for {', '.join(map(str, unknown))}")
    return lengths


def _counted(length: int) -> float:
    """Multiplications of mlx-lm over ours for a whole K2 layer, projections included."""
    shape, keys = AttentionShape(64, 128, 64, 128, 512), CACHED + length
    absorbed, expanded = (64 * each for each in shape.products(length, keys))
    theirs = absorbed if length == 1 else expanded
    projections = length * K2_PROJECTIONS
    return (theirs + projections) / (min(absorbed, expanded) + projections)


if __name__ == "__main__":
    sys.exit(main())
