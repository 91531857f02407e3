"""Experts from disk against all of them in memory: the time of decoding and of a prompt, the bytes read, and the peak.

    exo-kimi bench expert-streaming [--rounds N]

The same model twice, one with fewer slots than experts. Files lie in the page cache, so no figure is a disk's.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from exo_kimi.bench.frame import Result, Row, finish, taken_in_turn
from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import StageManifest, resolve
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.experts.budget import ExpertCache
from exo_kimi.experts.layout import layouts_of
from exo_kimi.models.expert_bank import StreamedExperts
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.runtime.loading.loader import load_stage

HELD_BAR, MISS_BAR, PROMPT_BAR, PEAK_BAR = 1.02, 1.25, 1.5, 1.02
EXPERTS, CHOSEN, LAYERS = 32, 8, 3
PROMPT, CHUNK = 2000, 512
SLOW_READ_S, AHEAD = 0.0005, 2
COUNTERS = Path("/proc/self/io")
SHAPES: dict[str, dict[str, Any]] = {
    "decode": {"hidden_size": 512, "moe_intermediate_size": 256},
    "prompt": {"hidden_size": 256, "moe_intermediate_size": 128},
}


@dataclass(frozen=True, slots=True)
class DecodeRun:
    """Some steps: seconds of each on average and in the middle, seconds of reading in it, and the tokens."""

    step_s: float
    median_s: float
    read_s: float
    tokens: tuple[int, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; the exit status."""
    parser = argparse.ArgumentParser(prog="exo-kimi bench expert-streaming", description="experts from disk")
    parser.add_argument("--rounds", type=int, default=11, help="pairs of runs (default 11)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        decode = checkpoint(Path(folder) / "decode", SHAPES["decode"])
        prompt = checkpoint(Path(folder) / "prompt", SHAPES["prompt"])
        rows = [
            peak_row(decode),
            *decode_rows(decode, options.rounds),
            *prompt_rows(prompt, max(1, options.rounds // 3)),
        ]
    return finish(
        Result(
            bench="expert-streaming",
            against="the same model with every expert in memory",
            rows=rows,
            notes=[
                f"{LAYERS} layers, {EXPERTS} experts of which a token takes {CHOSEN}, official INT4, float32",
                f"missing: ours over theirs and the time of reading; prompt: {PROMPT:,} tokens in chunks of {CHUNK}",
                "bytes: read over those of the experts that were missing, by the kernel's count where there is one",
            ],
        ),
        options,
    )


def checkpoint(directory: Path, shape: dict[str, Any]) -> StageManifest:
    """A random model in the official layout."""
    config = {
        "num_hidden_layers": LAYERS,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": CHOSEN,
        "intermediate_size": 512,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        **shape,
    }
    made = make_tiny(directory, layout="int4", dtype="F32", scales_dtype="F32", config=config, seed=1)
    return resolve(open_index(made))


def loaded(manifest: StageManifest, slots: int | None) -> Model:
    """The model, with so many slots a layer."""
    each = sum(layout.slot_bytes for layout in layouts_of(manifest.sources).values())
    cache = None if slots is None else ExpertCache(budget_bytes=slots * each)
    return load_stage(manifest, fuse=True, expert_cache=cache)


def streamed(model: Model) -> StreamedExperts:
    """Of a model that has fewer slots than experts."""
    if model.streamed is None:
        raise RuntimeError("every expert is held")
    return model.streamed


class Decoding:
    """Greedy decoding of one sequence."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.caches = model.make_cache()
        hidden = model.forward_ragged(mx.arange(32, dtype=mx.int32), [(32, self.caches)])
        self.token = mx.argmax(model.logits(hidden[-1:]), axis=-1).astype(mx.int32)

    def run(self, steps: int) -> DecodeRun:
        """So many tokens."""
        read_s = self.model.streamed.store.counters.read_s if self.model.streamed is not None else 0.0
        tokens: list[int] = []
        ends_s = [time.perf_counter()]
        for _ in range(steps):
            hidden = self.model.forward_ragged(self.token, [(1, self.caches)])
            self.token = mx.argmax(self.model.logits(hidden), axis=-1).astype(mx.int32)
            tokens += np.array(self.token).tolist()
            ends_s.append(time.perf_counter())
        each_s = np.diff(ends_s)
        spent_s = self.model.streamed.store.counters.read_s - read_s if self.model.streamed is not None else 0.0
        return DecodeRun(float(each_s.mean()), float(np.median(each_s)), spent_s / steps, tuple(tokens))


def decode_rows(manifest: StageManifest, rounds: int) -> list[Row]:
    """With room for all, and with about a tenth missing."""
    plain = loaded(manifest, None)
    ours, theirs = Decoding(loaded(manifest, EXPERTS)), Decoding(plain)
    # Step by step in turn: both run the same code, and what is left is how the machine's speed changes meanwhile.
    pairs = taken_in_turn(lambda: ours.run(1), lambda: theirs.run(1), rounds=16 * rounds, warm=8)
    held = Row.of_pairs(
        "decode, all held",
        [(one.median_s, other.median_s) for one, other in pairs],
        unit="s",
        bar=HELD_BAR,
        direction="at most",
        inverse=True,
        equal=all(one.tokens == other.tokens for one, other in pairs),
    )
    model = loaded(manifest, EXPERTS - 3)
    ours, theirs = Decoding(model), Decoding(plain)
    pairs = taken_in_turn(lambda: ours.run(8), lambda: theirs.run(8), rounds=rounds)
    found = streamed(model)
    counters = found.counters
    missing = Row.of_pairs(
        "decode, a tenth missing",
        [(one.step_s, other.step_s + one.read_s) for one, other in pairs],
        unit="s",
        bar=MISS_BAR,
        direction="at most",
        inverse=True,
        note=f"{counters.misses / (counters.hits + counters.misses):.1%} missing",
        equal=all(one.tokens == other.tokens for one, other in pairs),
    )
    return [held, missing, bytes_row(manifest), ahead_row(manifest, max(1, rounds // 3))]


def bytes_row(manifest: StageManifest) -> Row:
    """What is read for a token, by the kernel's count, over the bytes of the experts that were missing: a quarter is held."""
    model = loaded(manifest, EXPERTS // 4)
    ours, found = Decoding(model), streamed(model)
    reads = found.store.counters
    misses, read_bytes, kernel_before = found.counters.misses, reads.read_bytes, kernel_bytes()
    ours.run(8)
    kernel = kernel_bytes() - kernel_before
    wanted = (found.counters.misses - misses) * next(iter(found.banks.values())).layout.disk_bytes
    if not wanted:
        raise RuntimeError("nothing was missing")
    read = kernel if COUNTERS.exists() else reads.read_bytes - read_bytes
    return _bytes_row("bytes of a token", read / 8, wanted / 8, equal=reads.read_bytes - read_bytes == wanted)


def ahead_row(manifest: StageManifest, rounds: int) -> Row:
    """Decoding with AHEAD experts of a layer read ahead against none, with as many slots, both from a disk that takes SLOW_READ_S
    for a read whatever else it does."""
    each = sum(layout.slot_bytes for layout in layouts_of(manifest.sources).values())
    models = []
    for prefetch, slots in (
        ("on", EXPERTS // 4 + CHOSEN),
        ("off", EXPERTS // 4),
    ):  # memory for reading ahead is of the budget
        cache = ExpertCache(budget_bytes=slots * each, prefetch=prefetch, reads="cached")
        model = load_stage(manifest, fuse=True, expert_cache=cache)
        streamed(model).store._preadv = slow_preadv
        models.append(model)
    prefetcher = streamed(models[0]).prefetcher
    if prefetcher is None or streamed(models[0]).slots != streamed(models[1]).slots:
        raise RuntimeError("not the same number of slots")
    prefetcher.policy.count = AHEAD
    ours, theirs = map(Decoding, models)
    pairs = taken_in_turn(lambda: ours.run(8), lambda: theirs.run(8), rounds=rounds)
    counters = streamed(models[0]).store.counters
    used = counters.prefetch_used_bytes / max(1, counters.prefetched_bytes)
    return Row.of_pairs(
        "decode, read ahead, slow disk",
        [(one.step_s, other.step_s) for one, other in pairs],
        unit="s",
        inverse=True,
        note=f"over none; {used:.0%} of what was read ahead was used",
        equal=all(one.tokens == other.tokens for one, other in pairs),
    )


def slow_preadv(descriptor: int, buffers: Sequence[memoryview], position: int) -> int:
    """As `os.preadv`, after a while."""
    time.sleep(SLOW_READ_S)
    return os.preadv(descriptor, buffers, position)


def _bytes_row(name: str, ours: float, theirs: float, *, equal: bool) -> Row:
    ratio = ours / theirs if theirs else float(ours == theirs)
    # The kernel counts what asking it reads, a hundred bytes.
    return Row(
        name=name, ours=ours, theirs=theirs, unit="bytes", ratio=ratio, bar=1.001, direction="at most", equal=equal
    )


def kernel_bytes() -> int:
    """What read calls gave to this process, where the system counts it."""
    return int(COUNTERS.read_text().split()[1]) if COUNTERS.exists() else 0


def prompt_rows(manifest: StageManifest, rounds: int) -> list[Row]:
    """A prompt with slots for a quarter of the experts."""
    ours, theirs = loaded(manifest, EXPERTS // 4), loaded(manifest, None)
    pairs = taken_in_turn(lambda: prefill(ours), lambda: prefill(theirs), rounds=rounds)
    misses = streamed(ours).counters.misses
    prefill(ours)
    passes = -(-PROMPT // CHUNK) * (LAYERS - 1)
    reads = (streamed(ours).counters.misses - misses) / passes
    return [
        Row.of_pairs(
            "prompt, a quarter held",
            [(one[0], other[0]) for one, other in pairs],
            unit="s",
            bar=PROMPT_BAR,
            direction="at most",
            inverse=True,
            equal=all(one[1] == other[1] for one, other in pairs),
        ),
        Row(
            name="experts read in a chunk",
            ours=reads,
            theirs=EXPERTS - EXPERTS // 4,
            unit="experts",
            ratio=reads / (EXPERTS - EXPERTS // 4),
            bar=1.0,
            direction="at most",
            note="of a layer; those that are not held, once each",
        ),
    ]


def prefill(model: Model) -> tuple[float, tuple[float, ...]]:
    """Seconds of a prompt, and the hidden state after it."""
    caches = model.make_cache()
    prompt = mx.array((np.arange(PROMPT) * 7919 % 1000).astype(np.int32))
    hidden = prompt
    started_s = time.perf_counter()
    for start in range(0, PROMPT, CHUNK):
        tokens = prompt[start : start + CHUNK]
        asked = [int(start + CHUNK >= PROMPT)]
        hidden = model.forward_ragged(tokens, [(tokens.shape[0], caches)], asked=asked)
        mx.eval(hidden, [cache.state for cache in caches])
    taken_s = time.perf_counter() - started_s
    return taken_s, tuple(np.array(hidden[-1]).tolist())


def peak_row(manifest: StageManifest) -> Row:
    """The most that MLX holds while loading and while decoding, beside the caches, over weights and slots."""
    mx.clear_cache()
    before_bytes = mx.get_active_memory()
    mx.reset_peak_memory()
    model = loaded(manifest, EXPERTS // 4)
    loading_bytes = mx.get_peak_memory() - before_bytes
    decoding = Decoding(model)
    decoding.run(8)
    warm_bytes = mx.get_active_memory()
    mx.reset_peak_memory()
    decoding.run(32)
    peak_bytes = mx.get_peak_memory() - before_bytes - model.cache_nbytes(decoding.caches)
    backbone_bytes = sum(
        source.resident_bytes + source.widened_bytes for source in manifest.sources if source.spec.kind != "experts"
    )
    wanted_bytes = backbone_bytes + streamed(model).slot_bytes
    peak_bytes = max(loading_bytes, peak_bytes)
    return Row(
        name="peak, a quarter held",
        ours=peak_bytes,
        theirs=wanted_bytes,
        unit="bytes",
        ratio=peak_bytes / wanted_bytes,
        bar=PEAK_BAR,
        direction="at most",
        note=f"over weights and slots; {mx.get_active_memory() - warm_bytes:,} bytes more after 32 tokens",
        equal=mx.get_active_memory() <= warm_bytes,
    )


if __name__ == "__main__":
    sys.exit(main())
