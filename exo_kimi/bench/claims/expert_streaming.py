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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from exo_kimi.bench.frame import Result, Row, finish, taken_in_turn
from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import StageManifest, resolve
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.experts.asked import asked
from exo_kimi.experts.budget import ExpertCache
from exo_kimi.experts.layer_cache import LayerCache
from exo_kimi.experts.layout import layouts_of
from exo_kimi.experts.policies import LRU
from exo_kimi.models.expert_bank import StreamedExperts
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.models.moe import MoE
from exo_kimi.runtime.loading.loader import load_stage

HELD_BAR, MISS_BAR, PROMPT_BAR, PEAK_BAR = 1.02, 1.25, 1.5, 1.02
EXPERTS, CHOSEN, LAYERS = 32, 8, 3
MISSED, MISSED_WITHIN = 0.1, 0.005
STEPS = 8
PROMPTS = range(0, 160, 20)
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
    """Greedy decoding of one sequence, whose prompt is 32 ids from `first` on."""

    def __init__(self, model: Model, first: int = 0) -> None:
        self.model = model
        self.caches = model.make_cache()
        hidden = model.forward_ragged(mx.arange(first, first + 32, dtype=mx.int32), [(32, self.caches)])
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
    return [held, tenth_row(manifest, plain, rounds), bytes_row(manifest), ahead_row(manifest, max(1, rounds // 3))]


def tenth_row(manifest: StageManifest, plain: Model, rounds: int) -> Row:
    """Where a tenth of what is asked for is missing: a prompt and a budget of which a trace says so, and then the slots do."""
    for first in PROMPTS:
        requests = recorded(plain, first, STEPS * (1 + rounds))
        shares = missed_shares(requests, after=1 + STEPS)
        slots = min(shares, key=lambda count: abs(shares[count] - MISSED))
        if abs(shares[slots] - MISSED) <= MISSED_WITHIN:
            break
    each = {layer: layout.slot_bytes for layer, layout in layouts_of(manifest.sources).items()}
    cache = ExpertCache(budget_bytes=slots * min(each.values()), prefetch="off")
    model = load_stage(manifest, fuse=True, expert_cache=cache)
    ours, theirs = Decoding(model, first), Decoding(plain, first)
    ours.run(STEPS), theirs.run(STEPS)
    before = streamed(model).counters
    pairs = taken_in_turn(lambda: ours.run(STEPS), lambda: theirs.run(STEPS), rounds=rounds, warm=0)
    after = streamed(model).counters
    misses, hits = after.misses - before.misses, after.hits - before.hits
    share = misses / (hits + misses)
    if abs(share - MISSED) > MISSED_WITHIN:
        raise RuntimeError(f"{share:.1%} are missing, expected {MISSED:.0%}")
    return Row.of_pairs(
        "decode, a tenth missing",
        [(one.step_s, other.step_s + one.read_s) for one, other in pairs],
        unit="s",
        bar=MISS_BAR,
        direction="at most",
        inverse=True,
        note=f"{share:.1%} missing: {misses} of {hits + misses}",
        equal=all(one.tokens == other.tokens for one, other in pairs),
    )


def recorded(model: Model, first: int, steps: int) -> dict[int, list[list[int]]]:
    """What each layer is asked for: in the pass of the prompt, and in each step of decoding."""
    requests: dict[int, list[list[int]]] = {}
    routers = {layer: block.mlp.gate for layer, block in enumerate(model.layers) if isinstance(block.mlp, MoE)}

    def note(layer: int, indices: mx.array) -> None:
        requests.setdefault(layer, []).append(asked(np.array(indices).reshape(-1)))

    for layer, router in routers.items():
        router.on_choice = partial(note, layer)
    Decoding(model, first).run(steps)
    for router in routers.values():
        router.on_choice = None
    return requests


def missed_shares(requests: Mapping[int, list[list[int]]], *, after: int) -> dict[int, float]:
    """By the number of slots of all layers together, dealt as a budget deals them: of what is asked for after the first passes,
    the share that is missing."""
    shares = {}
    for slots in range(len(requests) * CHOSEN, len(requests) * EXPERTS):
        missed = wanted = 0
        for number, passes in enumerate(requests.values()):
            cache = LayerCache(slots // len(requests) + (number < slots % len(requests)), LRU())
            for place, experts in enumerate(passes):
                before = cache.counters.misses
                cache.install(cache.request(experts))
                if place >= after:
                    missed += cache.counters.misses - before
                    wanted += len(experts)
        shares[slots] = missed / wanted
    return shares


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
