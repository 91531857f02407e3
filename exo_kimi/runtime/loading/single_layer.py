"""One layer of a checkpoint, loaded alone and run on random input: what `exo-kimi layer DIR N` shows.

It answers on one machine whether the layer loads, computes finite numbers, and how fast.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.manifest import ModuleSource
from exo_kimi.errors import UsageError
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.models.ops import KVCache
from exo_kimi.runtime.loading.loader import check_dtype, load_stage
from exo_kimi.units import format_bytes, format_seconds

PREFILL_RUNS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleLine:
    """One module: its logical shape, what it is stored in, and the bytes that it holds in memory."""

    path: str
    shape: tuple[int, ...]
    stored: str
    resident_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """What a layer is and how it ran. `*_first_s` is the run that also compiles and touches the weights for the first time;
    `prefill_s` and `decode_s` are medians of the runs after it. `decode_bytes` are the weights that one token reads."""

    layer: int
    mixture_of_experts: bool
    modules: tuple[ModuleLine, ...]
    device: str
    dtype: str
    disk_bytes: int
    resident_bytes: int
    decode_bytes: int
    peak_bytes: int
    cache_bytes: int
    load_s: float
    prefill_tokens: int
    prefill_first_s: float
    prefill_s: float
    decode_steps: int
    decode_first_s: float
    decode_s: float
    input_shape: tuple[int, int]
    output_shape: tuple[int, ...]
    output_is_finite: bool

    def to_text(self) -> str:
        """The report as `exo-kimi layer` prints it."""
        width = max(len(line.path) for line in self.modules)
        kind = "mixture of experts" if self.mixture_of_experts else "dense"
        rows = [f"layer {self.layer} ({kind}), {self.dtype} activations, on {self.device}"]
        rows += [
            f"  {line.path:<{width}}  {line.stored:<12} {_dims(line.shape):<18} {format_bytes(line.resident_bytes):>10}"
            for line in self.modules
        ]
        rate = self.decode_bytes / self.decode_s / 1e9
        rows += [
            f"load     {format_bytes(self.disk_bytes)} read in {format_seconds(self.load_s)}, "
            f"{format_bytes(self.resident_bytes)} resident",
            f"prefill  {_dims(self.input_shape)} -> {_dims(self.output_shape)} in {format_seconds(self.prefill_s)} "
            f"({self.prefill_tokens / self.prefill_s:.0f} tokens/s; first run {format_seconds(self.prefill_first_s)})",
            f"decode   {self.decode_s * 1000:.2f} ms a token, {format_bytes(self.decode_bytes)} of weights a token, "
            f"{rate:.1f} GB/s (first {self.decode_first_s * 1000:.2f} ms; {self.decode_steps} steps)",
            f"memory   {format_bytes(self.peak_bytes)} at peak, {format_bytes(self.cache_bytes)} of it cache",
            f"output   {'finite' if self.output_is_finite else 'NOT FINITE: this layer would break every answer'}",
        ]
        return "\n".join(rows)


def run_layer(
    path: str | Path, layer: int, *, tokens: int = 32, decode_steps: int = 8, dtype: str | None = None
) -> LayerReport:
    """Load one decoder layer and nothing else, and run a prefill and then single tokens through it.

    Args:
        path: a checkpoint directory in any published layout.
        layer: number of the layer, from 0.
        tokens: length of the random prompt; at least 1.
        decode_steps: single tokens after it; at least 2.
        dtype: of floating parameters and activations, see `loader.load`.

    Raises:
        SplitError: there is no such layer.
        CheckpointError: the layer cannot be loaded from what is on disk.
        UsageError: an unknown dtype, or more tokens than the model has positions.
    """
    check_dtype(dtype)
    gc.collect()  # what the collector frees while this loads would count as less
    before_bytes = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.perf_counter()
    manifest = Checkpoint(path).manifest(layer, layer + 1)
    _check_positions(tokens + max(2, decode_steps), manifest.config.max_position_embeddings)
    model = load_stage(manifest, dtype=dtype, layers_only=True)
    load_s = time.perf_counter() - start
    resident_bytes = mx.get_active_memory() - before_bytes

    activations = model.layers[0].input_layernorm.weight.dtype
    prompt = mx.random.normal((tokens, manifest.config.hidden_size)).astype(activations)
    token = mx.random.normal((1, manifest.config.hidden_size)).astype(activations)
    mx.eval(prompt, token)
    caches = model.make_cache()
    outputs: list[mx.array] = []

    def prefill() -> None:
        nonlocal caches
        caches = model.make_cache()
        outputs[:] = [_run(model, prompt, caches)]

    prefill_first_s, prefill_s = _timed(prefill, PREFILL_RUNS)
    decode_first_s, decode_s = _timed(lambda: outputs.append(_run(model, token, caches)), decode_steps)
    sources = [source for source in manifest.sources if source.spec.layer == layer]
    config = manifest.config
    share = config.num_experts_per_tok / max(config.routed_experts(layer), 1)
    return LayerReport(
        layer=layer,
        mixture_of_experts=config.is_moe(layer),
        modules=tuple(_line(source) for source in sources),
        device=str(mx.default_device()).removeprefix("Device(").partition(",")[0],
        dtype=str(activations).rpartition(".")[2],
        disk_bytes=sum(source.disk_bytes for source in sources),
        resident_bytes=resident_bytes,
        decode_bytes=sum(
            int(source.resident_bytes * (share if source.spec.kind == "experts" else 1)) for source in sources
        ),
        peak_bytes=mx.get_peak_memory() - before_bytes,
        cache_bytes=model.cache_nbytes(caches),
        load_s=load_s,
        prefill_tokens=tokens,
        prefill_first_s=prefill_first_s,
        prefill_s=prefill_s,
        decode_steps=decode_steps,
        decode_first_s=decode_first_s,
        decode_s=decode_s,
        input_shape=(tokens, config.hidden_size),
        output_shape=tuple(outputs[0].shape),
        output_is_finite=all(bool(mx.isfinite(output).all()) for output in outputs),
    )


def _check_positions(needed: int, limit: int) -> None:
    if needed > limit:
        raise UsageError(
            "the model has not so many positions",
            expected=f"at most {limit} (max_position_embeddings)",
            found=f"{needed} tokens, prompt and single ones",
            where="--tokens",
        )


def _run(model: Model, x: mx.array, caches: list[KVCache]) -> mx.array:
    output = model.forward_ragged(x, [(x.shape[0], caches)])
    mx.eval(output)
    return output


def _timed(run: Callable[[], None], count: int) -> tuple[float, float]:
    """Seconds of the first run and median of those after it."""
    seconds = []
    for _ in range(max(2, count)):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds[0], statistics.median(seconds[1:])


def _line(source: ModuleSource) -> ModuleLine:
    quant = source.quant
    stored = f"{quant.bits}-bit g{quant.group_size}" if quant else source.layout
    if source.layout == "plain":
        stored = source.dtype.lower()
    return ModuleLine(
        path=source.spec.path, shape=source.spec.shape, stored=stored, resident_bytes=source.resident_bytes
    )


def _dims(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape)
