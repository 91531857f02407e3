"""Check one layer of a checkpoint on one machine, before 500 GB of it go to several.

    python examples/check_one_layer.py /models/kimi-k2 3

It loads the layer strictly, with only its own bytes, and runs random input through it three ways: as one prompt, in two
chunks, and token by token, as decoding does. The outputs must be finite and agree. `exo-kimi layer DIR N` adds times and memory.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import mlx.core as mx

import exo_kimi

TOKENS = 16
WAYS = {"in two chunks": (10, 6), "token by token": (1,) * TOKENS}
FARTHEST = 1e-3  # of the output's largest value, in float32: other orders of adding, nothing more


def outputs(model: Any, hidden: mx.array, lengths: tuple[int, ...]) -> mx.array:
    """The layer's output for `hidden` [1, L, D], given in pieces of these lengths over one cache."""
    cache, parts, start = model.make_cache(), [], 0
    for length in lengths:
        parts.append(model(hidden[:, start : start + length], cache=cache))
        start += length
    return mx.concatenate(parts, axis=1)


def main() -> int:
    """Print what agrees; 1 when something does not."""
    parser = argparse.ArgumentParser(description="whether one layer loads and computes the same in every way")
    parser.add_argument("directory", type=Path, help="a checkpoint, or one that has this layer's files")
    parser.add_argument("layer", type=int, help="from 0; not the first or the last, which hold embedding and head")
    options = parser.parse_args()

    model = exo_kimi.load(options.directory, options.layer, options.layer + 1, dtype="float32")
    hidden = mx.random.normal((1, TOKENS, model.args.hidden_size), key=mx.random.key(0))
    whole = outputs(model, hidden, (TOKENS,))
    largest = mx.abs(whole).max().item()
    right = bool(mx.isfinite(whole).all().item())
    print(f"layer {options.layer}: {whole.shape}, {'finite' if right else 'NOT finite'}, largest value {largest:.3g}")
    for name, lengths in WAYS.items():
        off = mx.abs(outputs(model, hidden, lengths) - whole).max().item() / largest
        right = right and off < FARTHEST
        print(f"  {name:<15} differs by {off:.1e} of it")
    print("good" if right else "WRONG: run `exo-kimi doctor DIR --deep`")
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
