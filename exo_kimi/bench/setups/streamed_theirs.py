"""Decode with mlx-vlm's expert offload, run by the Python of its own environment: `PYTHON streamed_theirs.py DIR GB IDS N`.

Prints one JSON line. It imports nothing of exo-kimi, which is not installed there.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def read_bytes() -> int:
    """Bytes that this process has asked of files, as the kernel counts them."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def main(directory: str, cache_gb: str, prompt: str, new_tokens: str) -> None:
    """Load, prefill, decode greedily."""
    import mlx.core as mx
    from mlx_vlm.models.cache import make_prompt_cache  # type: ignore[import-not-found]
    from mlx_vlm.utils import load_model  # type: ignore[import-not-found]

    model = load_model(Path(directory), expert_cache_gb=float(cache_gb))
    language, store = model.language_model, model.moe_offload_store
    cache = make_prompt_cache(language)

    def step(ids: list[int]) -> int:
        output: Any = language(mx.array([ids]), cache=cache)
        chosen: Any = mx.argmax(output.logits[0, -1]).item()
        return int(chosen)

    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    tokens = [step(json.loads(prompt))]
    prefill_s, prefill_cpu_s = time.perf_counter() - started_s, time.process_time() - started_cpu_s
    before, before_bytes = store.stats(), read_bytes()
    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    for _ in range(int(new_tokens)):
        tokens.append(step([tokens[-1]]))
    decode_s, decode_cpu_s = time.perf_counter() - started_s, time.process_time() - started_cpu_s
    after = store.stats()
    found = {"tokens": tokens, "prefill_s": prefill_s, "decode_s": decode_s, "read_bytes": read_bytes() - before_bytes}
    counted = {key: after[key] - before[key] for key in ("hits", "misses")}
    processor = {"prefill_cpu_s": prefill_cpu_s, "decode_cpu_s": decode_cpu_s}
    print(json.dumps({**found, **counted, **processor, "peak_bytes": mx.get_peak_memory()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
