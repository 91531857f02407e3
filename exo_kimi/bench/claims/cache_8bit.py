"""The 8-bit latent cache against our cache in the dtype of the activations; mlx-lm has none that works for this architecture.

    exo-kimi bench cache-8bit [--tokens 400] [--rounds 5]

mlx-lm's error with `kv_bits=8`, bytes at K2's widths, logits against the stated bound on a tiny random checkpoint; the answers
of the tiny Kimi of the package to held-out questions until the first token that differs; and a decode step at K2's attention
widths against one that unpacks the whole cache, which is its oracle.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from exo_kimi.bench.frame import Result, Row, finish, seconds, taken_in_turn
from exo_kimi.bench.setups.layers import layer_config, relative_gap
from exo_kimi.bench.setups.tiny_answers import TinyAnswers
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.models.latent_cache import LatentCache8, extend
from exo_kimi.models.ops import KVCache
from exo_kimi.runtime.loading.loader import load

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
HEADS, KEYS = 16, 8192
EQUAL = 1e-4


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; the exit status."""
    parser = argparse.ArgumentParser(prog="exo-kimi bench cache-8bit", description="the 8-bit latent cache")
    parser.add_argument("--tokens", type=int, default=400, help="greedy tokens to compare (default 400)")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of decode steps (default 5)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        logits, theirs = logits_row(Path(folder))
    return finish(
        Result(
            bench="cache-8bit",
            against=f"mlx-lm {version('mlx-lm')}, which with kv_bits=8 gives {theirs}",
            rows=[bytes_row(), logits, greedy_row(options.tokens), *decode_rows(options.rounds)],
            notes=[
                f"logits: random checkpoint, 4 layers, kv_lora 128, {PROMPT} tokens of prompt; float32",
                f"decode: a layer of {HEADS} heads at K2's widths, {KEYS:,} cached tokens; theirs: ours, unpacking all of them",
            ],
        ),
        options,
    )


def bytes_row() -> Row:
    """4,096 tokens of one layer."""
    ours_bytes, plain_bytes = (held_bytes(cache) for cache in (LatentCache8(), KVCache()))
    return Row(
        name="bytes, K2's widths",
        ours=ours_bytes,
        theirs=plain_bytes,
        unit="bytes",
        ratio=plain_bytes / ours_bytes,
        bar=BYTES_BAR,
        note="theirs: our cache in bf16, 4,096 tokens of one layer",
    )


def logits_row(folder: Path) -> tuple[Row, str]:
    """How far the logits of a prompt are from those of the plain cache; and what mlx-lm says to 8 bits."""
    directory = make_tiny(folder / "tiny", recipe="plain", dtype="F32", absorbed=True, seed=5, config=CONFIG)
    model = load(directory)
    mx.random.seed(0)
    prompt = mx.random.randint(0, model.args.vocab_size, (PROMPT,)).astype(mx.int32)
    plain, packed = (after_prompt(model, prompt, kv_bits) for kv_bits in (None, 8))
    deviation = mx.sqrt(mx.var(plain))
    gap = float(mx.sqrt(mx.mean((packed - plain) ** 2)) / deviation)
    worst = mx.sort(mx.abs(packed - plain).max(axis=-1) / deviation)
    note = f"largest of a token: median {float(worst[PROMPT // 2]):.2g}, all {float(worst[-1]):.2g} (another expert)"
    row = Row(name="logits", ours=gap, unit="sd", ratio=gap, bar=LOGITS_BOUND, direction="at most", note=note)
    return row, their_error(directory, prompt)


def greedy_row(tokens: int) -> Row:
    """The shipped model's answers with both caches."""
    tiny = TinyAnswers()
    plain, packed = (tiny.ask(tokens, before=lambda model, b=bits: model.set_kv_bits(b)) for bits in (None, 8))  # type: ignore[misc]
    expected, found = (list(chain.from_iterable(answer.tokens for answer in answers)) for answers in (plain, packed))
    pairs = enumerate(zip(found, expected, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(found), len(expected)))
    verdict = "all equal" if found == expected else f"the first difference is token {same}"
    right = f"{sum(a.right for a in packed)} of {len(packed)} answers right (theirs {sum(a.right for a in plain)})"
    return Row(
        name="greedy tokens, tiny Kimi",
        ours=same,
        theirs=len(expected),
        unit="tokens",
        ratio=same / len(expected),
        note=f"{verdict}; {right}",
    )


def decode_rows(rounds: int) -> list[Row]:
    """Time and peak of a decode step that multiplies with the codes, over one that unpacks them."""
    config = layer_config(heads=HEADS, hidden=512, q_rank=256)
    mx.random.seed(0)
    contents = [mx.random.normal((1, 1, KEYS - 64, width)) for width in (config.kv_lora_rank, config.qk_rope_head_dim)]
    caches = [LatentCache8(), LatentCache8()]
    for cache in caches:
        cache.append(*contents)
        mx.eval(cache.state)
    del contents
    new = [mx.random.normal((1, 1, 1, width)) for width in (config.kv_lora_rank, config.qk_rope_head_dim)]
    queries = [mx.random.normal((1, 1, HEADS, width)) for width in (config.kv_lora_rank, config.qk_rope_head_dim)]
    mx.eval(new, queries)

    def step(*, whole: bool) -> tuple[float, int, mx.array]:
        cache, outputs = caches[whole], []

        def attend() -> None:
            seen = extend(cache, *new)
            seen = seen.whole() if whole else seen
            weights = mx.softmax(seen.scores(*queries, scale=config.attention_scale), axis=-1, precise=True)
            outputs.append(seen.mixed(weights))
            mx.eval(outputs[-1], cache.state)

        mx.clear_cache()
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        taken_s = seconds(attend)
        return taken_s, mx.get_peak_memory() - held, outputs[-1]

    pairs = taken_in_turn(lambda: step(whole=False), lambda: step(whole=True), rounds=rounds)
    equal = max(relative_gap(ours[2], theirs[2]) for ours, theirs in pairs) <= EQUAL
    times = [(ours[0], theirs[0]) for ours, theirs in pairs]
    peaks = [(ours[1], theirs[1]) for ours, theirs in pairs]
    return [
        Row.of_pairs("decode, peak", peaks, unit="bytes", bar=0.25, direction="at most", inverse=True, equal=equal),
        Row.of_pairs("decode, time", times, unit="s", bar=1.0, direction="at most", inverse=True, equal=equal),
    ]


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


def held_bytes(cache: Any) -> int:
    """Bytes of 4,096 tokens at K2's widths in bf16."""
    cache.update_and_fetch(mx.zeros((1, 1, 4096, 512), mx.bfloat16), mx.zeros((1, 1, 4096, 64), mx.bfloat16))
    return int(cache.nbytes)


if __name__ == "__main__":
    sys.exit(main())
