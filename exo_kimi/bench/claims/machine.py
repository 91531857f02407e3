"""What this machine really does, for a planner profile: bandwidth, overhead per layer, speed of prefill.

    python -m exo_kimi.bench.claims.machine [FILE]       measure, print, and write the profile

Bandwidth is what a 4-bit matrix-vector product reads, which is what decoding does; the overhead is what a tiny model's step
takes beside that; prefill is grouped 4-bit experts on a chunk of tokens; attention is what a longer context adds to a token; the
disk is read as streamed experts are.
Each is the lower quartile of repetitions, since other programs only ever slow things down.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from exo_kimi.bench.setups.disk import READERS, RECORD_BYTES, read_speed
from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import resolve
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.models.latent_cache import PlainLatents
from exo_kimi.planner.machines.local import local_profile
from exo_kimi.planner.machines.profile_text import profile_answer, profile_toml
from exo_kimi.planner.search.laws import EXPERT_TILE_ROWS
from exo_kimi.planner.weights.bytes import bytes_of_manifest
from exo_kimi.runtime.loading.loader import load_stage

REPETITIONS = 21
GROUP = 64
CHUNK = 512


def measure(disk: Path | None = None) -> dict[str, Any]:
    """The profile table of this machine, every value measured; its disk only where a directory on it is given."""
    table = local_profile()
    measured, source = dict(table["measured"]), dict(table["source"])
    how = f"exo_kimi.bench.claims.machine, mlx {version('mlx')}, {_device()}, lower quartile of {REPETITIONS}"
    limit = mx.device_info().get("max_recommended_working_set_size") if mx.metal.is_available() else None
    if limit:
        measured["limit_bytes"], source["limit_bytes"] = int(limit), "mx.device_info, max_recommended_working_set_size"
    bandwidth = measured["bandwidth_bytes_per_s"] = read_bandwidth()
    measured["prefill_flops_per_s"] = prefill_flops()
    measured["attention_flops_per_s"] = attention_speed(bandwidth)
    measured["overhead_per_layer_s"] = layer_overhead(bandwidth)
    speed = None if disk is None else read_speed(disk)
    if speed is not None:
        measured["ssd_bytes_per_s"] = speed
        source["ssd_bytes_per_s"] = (
            f"{READERS} readers, {RECORD_BYTES >> 20} MiB each, past the cache, in no order, {disk}"
        )
    source |= {key: how for key in measured if key not in source}
    return {**table, "measured": measured, "source": source}


def read_bandwidth() -> float:
    """Bytes per second that a 4-bit matrix-vector product reads; the matrix is far larger than any cache on a GPU."""
    rows, columns = (131_072, 8192) if mx.metal.is_available() else (8192, 2048)
    weight, scales, biases = _packed((rows, columns))
    x = mx.random.normal((1, columns), dtype=_dtype())
    seconds = quartile_s(lambda: mx.quantized_matmul(x, weight, scales, biases, group_size=GROUP, bits=4))
    stored_bytes = weight.nbytes + 2 * 2 * scales.size  # as checkpoints store scales and biases, whatever runs here
    return stored_bytes / seconds


def prefill_flops() -> float:
    """Floating-point operations per second of experts on a chunk, each expert meeting the tokens that chose it.

    They are counted as the law of prefill does, with a tile for each expert, on a GPU; a CPU has no tiles.
    """
    experts, chosen, hidden, width = (96, 8, 7168, 2048) if mx.metal.is_available() else (8, 2, 512, 512)
    tokens = CHUNK if mx.metal.is_available() else 64
    weight, scales, biases = _packed((experts, width, hidden))
    choices = mx.sort(mx.arange(tokens * chosen) % experts).astype(mx.uint32)
    x = mx.random.normal((tokens * chosen, 1, hidden), dtype=_dtype())
    quant: dict[str, Any] = {"group_size": GROUP, "bits": 4, "sorted_indices": True}
    seconds = quartile_s(lambda: mx.gather_qmm(x, weight, scales, biases, rhs_indices=choices, **quant))
    rows = tokens * chosen + (EXPERT_TILE_ROWS * experts if mx.metal.is_available() else 0)
    return 2.0 * rows * hidden * width / seconds


def attention_speed(bandwidth_bytes_per_s: float) -> float:
    """Floating-point operations per second of attention over a context: what a longer one adds to a token's step here, less the
    time in which its bytes are read.

    The path is exo-kimi's own, absorbed, as `models.mla` decodes (`PlainLatents`), with softmax; mlx-lm's may have another slope.
    """
    heads, rank, rope = (64, 512, 64) if mx.metal.is_available() else (16, 64, 16)
    short, long = (4096, 32_768) if mx.metal.is_available() else (1024, 8192)
    query, rotary = (mx.random.normal((1, 1, heads, width), dtype=_dtype()) for width in (rank, rope))

    def step_s(keys: int) -> float:
        latents = PlainLatents(*(mx.random.normal((1, 1, keys, width), dtype=_dtype()) for width in (rank, rope)))
        mx.eval(latents.latent, latents.k_pe)
        return quartile_s(
            lambda: latents.mixed(mx.softmax(latents.scores(query, rotary, scale=0.1), axis=-1, precise=True))
        )

    added_s = max(step_s(long) - step_s(short), 1e-9)
    read_s = (long - short) * (rank + rope) * _dtype().size / bandwidth_bytes_per_s
    flops = (long - short) * 2.0 * heads * (2 * rank + rope)
    return flops / max(added_s - read_s, added_s / 2)


def layer_overhead(bandwidth_bytes_per_s: float) -> float:
    """Seconds of a layer's decode step beside reading its weights, on a tiny model; never below zero."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = resolve(
            open_index(make_tiny(Path(folder) / "tiny", recipe="uniform4", config={"num_hidden_layers": 16}))
        )
        model = load_stage(manifest, dtype=None if mx.metal.is_available() else "float32", fuse=True)
    weights = bytes_of_manifest(manifest)
    caches = model.make_cache()
    mx.eval(model.forward_ragged(mx.array([1, 2, 3, 4]), [(4, caches)]))
    token = mx.array([5])
    step_s = quartile_s(lambda: model.logits(model.forward_ragged(token, [(1, caches)])))
    return max(0.0, (step_s - weights.active_bytes() / bandwidth_bytes_per_s) / weights.layers)


def quartile_s(run: Callable[[], mx.array], repetitions: int = REPETITIONS) -> float:
    """Seconds of a run: the lower quartile of repetitions, the first three apart."""
    times = []
    for _ in range(repetitions + 3):
        start_s = time.perf_counter()
        mx.eval(run())
        times.append(time.perf_counter() - start_s)
    return lower_quartile(times[3:])


def lower_quartile(times: Sequence[float]) -> float:
    """The time that a quarter of the times stay below."""
    return statistics.quantiles(times, n=4)[0]


def main(arguments: Sequence[str]) -> None:
    """Measure, print a table and one JSON line, and write the profile where asked."""
    table = measure(Path(tempfile.gettempdir()))
    print(profile_answer(table), end="")
    print(json.dumps({"bench": "machine", **table}, sort_keys=True))
    if arguments:
        Path(arguments[0]).write_text(profile_toml(table), encoding="utf-8")


def _packed(shape: tuple[int, ...]) -> tuple[mx.array, mx.array, mx.array]:
    """A random 4-bit matrix or stack, packed directly: its values do not matter."""
    *rows, columns = shape
    weight = mx.random.randint(0, 1 << 31, (*rows, columns * 4 // 32)).astype(mx.uint32)
    scales = mx.full((*rows, columns // GROUP), 1e-3, dtype=_dtype())
    mx.eval(weight, scales)
    return weight, scales, mx.zeros_like(scales)


def _dtype() -> mx.Dtype:
    return mx.bfloat16 if mx.metal.is_available() else mx.float32


def _device() -> str:
    return "GPU" if mx.metal.is_available() else "CPU"


if __name__ == "__main__":
    main(sys.argv[1:])
