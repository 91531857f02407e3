"""The 8-bit latent cache against our cache in the dtype of the activations; mlx-lm has none that works for this architecture.

    python -m exo_kimi.bench.cache_8bit [--tokens 200]

On a tiny random checkpoint: mlx-lm's error with `kv_bits=8`, bytes at K2's widths, logits against the stated bound, and greedy
tokens until the first that differs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from exo_kimi.bench.frame import Result, Row, finish
from exo_kimi.checkpoint.tiny import make_tiny
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.models.latent_cache import LatentCache8
from exo_kimi.models.ops import KVCache
from exo_kimi.runtime.loader import load

BYTES_BAR = 1.85
LOGITS_BOUND = 0.15
"""Root mean square difference of the logits over a prompt, in standard deviations of the logits. Their largest difference has no
useful bound: a token near a tie between two experts may go to the other one."""
CONFIG: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_rope_head_dim": 64,
}
PROMPT = 300


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; the exit status."""
    parser = argparse.ArgumentParser(prog="exo-kimi bench cache-8bit", description="the 8-bit latent cache")
    parser.add_argument("--tokens", type=int, default=200, help="greedy tokens to compare (default 200)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        directory = make_tiny(Path(folder) / "tiny", recipe="plain", dtype="F32", absorbed=True, seed=5, config=CONFIG)
        model = load(directory)
        mx.random.seed(0)
        prompt = mx.random.randint(0, model.args.vocab_size, (PROMPT,)).astype(mx.int32)
        theirs = their_error(directory, prompt)
        plain, packed = (after_prompt(model, prompt, kv_bits) for kv_bits in (None, 8))
        deviation = mx.sqrt(mx.var(plain))
        gap = float(mx.sqrt(mx.mean((packed - plain) ** 2)) / deviation)
        worst = mx.sort(mx.abs(packed - plain).max(axis=-1) / deviation)
        note = (
            f"largest of a token: median {float(worst[PROMPT // 2]):.2g}, all {float(worst[-1]):.2g} (another expert)"
        )
        found, expected = (greedy(model, prompt, options.tokens, kv_bits) for kv_bits in (8, None))
    same = next((i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b), len(expected))
    ours_bytes, plain_bytes = (held_bytes(cache) for cache in (LatentCache8(), KVCache()))
    rows = [
        Row(
            name="bytes, K2's widths",
            ours=ours_bytes,
            theirs=plain_bytes,
            unit="bytes",
            ratio=plain_bytes / ours_bytes,
            bar=BYTES_BAR,
            note="theirs: our cache in bf16, 4,096 tokens of one layer",
        ),
        Row(name="logits", ours=gap, unit="sd", ratio=gap, bar=LOGITS_BOUND, direction="at most", note=note),
        Row(
            name="greedy tokens",
            ours=same,
            theirs=len(expected),
            unit="tokens",
            ratio=same / len(expected),
            note="all equal" if same == len(expected) else f"the first difference is token {same}",
        ),
    ]
    return finish(
        Result(
            bench="cache-8bit",
            against=f"mlx-lm {version('mlx-lm')}, which with kv_bits=8 gives {theirs}",
            rows=rows,
            notes=[f"tiny checkpoint, 4 layers, kv_lora 128, {PROMPT} tokens of prompt, float32 but the bytes"],
        )
    )


def their_error(directory: Path, prompt: mx.array) -> str:
    """What mlx-lm's generation says to an 8-bit cache."""
    model, _ = load_model(directory)
    steps = generate_step(prompt, model, max_tokens=3, kv_bits=8, kv_group_size=64, quantized_kv_start=0)
    try:
        list(steps)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def after_prompt(model: Model, prompt: mx.array, kv_bits: int | None) -> mx.array:
    """(PROMPT, vocab) logits, in chunks of 100 so that all but the first attend to what the cache gives back."""
    model.set_kv_bits(kv_bits)
    caches, logits = model.make_cache(), []
    for start in range(0, prompt.shape[0], 100):
        tokens = prompt[start : start + 100]
        logits.append(model.logits(model.forward_ragged(tokens, [(tokens.shape[0], caches)])))
        mx.eval(logits[-1])
    return mx.concatenate(logits)


def greedy(model: Model, prompt: mx.array, count: int, kv_bits: int | None) -> list[int]:
    """The tokens that follow a prompt."""
    model.set_kv_bits(kv_bits)
    caches, tokens = model.make_cache(), prompt
    found: list[int] = []
    for _ in range(count):
        hidden = model.forward_ragged(tokens, [(tokens.shape[0], caches)])
        found += mx.argmax(model.logits(hidden[-1:]), axis=-1).tolist()  # type: ignore[arg-type]
        tokens = mx.array(found[-1:], dtype=mx.int32)
    return found


def held_bytes(cache: Any) -> int:
    """Bytes of 4,096 tokens at K2's widths in bf16."""
    cache.update_and_fetch(mx.zeros((1, 1, 4096, 512), mx.bfloat16), mx.zeros((1, 1, 4096, 64), mx.bfloat16))
    return int(cache.nbytes)


if __name__ == "__main__":
    sys.exit(main())
