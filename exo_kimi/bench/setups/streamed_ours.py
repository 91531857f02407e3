"""Decode with our experts from disk, in a process of its own: `python -m exo_kimi.bench.setups.streamed_ours DIR BYTES IDS N`.

Prints one JSON line, of the same keys as `streamed_theirs`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx

from exo_kimi.bench.setups.streamed_theirs import read_bytes
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.experts.budget import ExpertCache
from exo_kimi.runtime.loading.loader import load_stage


def main(directory: str, cache_bytes: str, prompt: str, new_tokens: str) -> None:
    """Load, prefill, decode greedily."""
    cache = ExpertCache(budget_bytes=int(cache_bytes))
    model = load_stage(Checkpoint(Path(directory)).manifest(), dtype="float32", fuse=True, expert_cache=cache)
    streamed = model.streamed
    if streamed is None:
        raise AssertionError("every expert is held")
    caches = model.make_cache()

    def step(ids: list[int]) -> int:
        hidden = model.forward_ragged(mx.array(ids), [(len(ids), caches)])
        chosen: Any = mx.argmax(model.logits(hidden[-1:])[0]).item()
        return int(chosen)

    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    tokens = [step(json.loads(prompt))]
    prefill_s, prefill_cpu_s = time.perf_counter() - started_s, time.process_time() - started_cpu_s
    before, before_bytes = streamed.counters, read_bytes()
    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    for _ in range(int(new_tokens)):
        tokens.append(step([tokens[-1]]))
    decode_s, decode_cpu_s = time.perf_counter() - started_s, time.process_time() - started_cpu_s
    after = streamed.counters
    found = {"tokens": tokens, "prefill_s": prefill_s, "decode_s": decode_s, "read_bytes": read_bytes() - before_bytes}
    counted = {"hits": after.hits - before.hits, "misses": after.misses - before.misses}
    processor = {"prefill_cpu_s": prefill_cpu_s, "decode_cpu_s": decode_cpu_s}
    print(json.dumps({**found, **counted, **processor, "peak_bytes": mx.get_peak_memory()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
