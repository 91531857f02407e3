"""Peak memory and time of prefill against mlx-lm, and whether the peak stays under a given budget.

    exo-kimi bench prefill-memory [--rounds N] [--prompt 32768]

Ratios are mlx-lm's peak over ours (beside weights, cache contents and inputs, which both hold), and our time over theirs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from exo_kimi.arch.config import KimiConfig
from exo_kimi.bench.frame import Result, Row, finish, taken_in_turn
from exo_kimi.bench.setups.layers import Layers, layer_config, relative_gap
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.runtime.loading.loader import load

MIB = 1 << 20
PEAK_BAR, TIME_BAR, EQUAL = 3.5, 1.0, 1e-4
CHUNK = 512
BUDGETS_MIB = (64, 128, 256, 512)
TOY: dict[str, Any] = {
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "num_attention_heads": 1,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
BUDGETED: dict[str, Any] = TOY | {
    "num_hidden_layers": 1,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    """Seconds, peak bytes beside what was held before, and the output."""

    time_s: float
    peak_bytes: int
    output: mx.array


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; the exit status."""
    parser = argparse.ArgumentParser(prog="exo-kimi bench prefill-memory", description="peak and time of prefill")
    parser.add_argument("--rounds", type=int, default=1, help="pairs of runs (default 1)")
    parser.add_argument("--prompt", type=int, default=32_768, help="tokens of the toy's prompt (default 32768)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        rows = [*layer_rows(options.rounds), *prompt_rows(Path(folder), options.prompt, options.rounds)]
        rows += budget_rows(Path(folder))
    return finish(
        Result(
            bench="prefill-memory",
            against=f"mlx-lm {version('mlx-lm')}",
            rows=rows,
            notes=[
                "layer: 16 heads of K2's widths, hidden 512, 1,024 new tokens, 4,096 in all; ours under 64 MiB of scratch more "
                "than its activations",
                f"prompt: 2 layers of 1 head, chunks of {CHUNK} under 64 MiB against mlx-lm's of 2,048; float32",
                "budget: 64 heads, 512 new tokens of 4,096; the ratio is peak over budget",
            ],
        ),
        options,
    )


def measured(run: Callable[[], mx.array]) -> MeasuredRun:
    """Run it once, with MLX's buffer cache empty."""
    mx.clear_cache()
    before_bytes = mx.get_active_memory()
    mx.reset_peak_memory()
    started_s = time.perf_counter()
    output = run()
    mx.eval(output)
    return MeasuredRun(time.perf_counter() - started_s, mx.get_peak_memory() - before_bytes, output)


def pair_rows(name: str, pairs: Sequence[tuple[MeasuredRun, MeasuredRun]]) -> list[Row]:
    """Peak and time of runs taken in turn."""
    gap = max(relative_gap(ours.output, theirs.output) for ours, theirs in pairs)
    peaks = [(float(ours.peak_bytes), float(theirs.peak_bytes)) for ours, theirs in pairs]
    times = [(ours.time_s, theirs.time_s) for ours, theirs in pairs]
    note = f"relative difference {gap:.0e}"
    return [
        Row.of_pairs(f"{name}, peak", peaks, unit="bytes", bar=PEAK_BAR, equal=gap <= EQUAL, note=note),
        Row.of_pairs(f"{name}, time", times, unit="s", bar=TIME_BAR, direction="at most", inverse=True),
    ]


def layer_rows(rounds: int) -> list[Row]:
    """One attention layer, H=16, L=1024, T=4096."""
    new, cached = 1024, 3072
    layers = Layers.random(layer_config(heads=16, hidden=512, q_rank=384))
    layers.ours.scratch_bytes = 160 * MIB
    contents, x = layers.contents(cached), layers.tokens(new)

    def run(step: Callable[..., mx.array]) -> MeasuredRun:
        cache = layers.cache(contents, new)
        return measured(lambda: step(x, cache))

    pairs = taken_in_turn(lambda: run(layers.run_ours), lambda: run(layers.run_theirs), rounds=rounds, warm=0)
    return pair_rows("layer", pairs)


def prompt_rows(folder: Path, count: int, rounds: int) -> list[Row]:
    """A long prompt through a whole toy, chunk by chunk, as each side cuts it."""
    directory = make_tiny(folder / "toy", recipe="plain", dtype="F32", absorbed=True, seed=3, config=TOY)
    ours, (theirs, _) = load(directory), load_model(directory)
    ours.set_scratch_bytes(64 * MIB)
    prompt = mx.random.randint(0, ours.args.vocab_size, (count,)).astype(mx.int32)
    mx.eval(prompt)

    def prefill_theirs() -> mx.array:
        logprobs: mx.array = next(iter(generate_step(prompt, theirs, max_tokens=1)))[1]
        return logprobs

    pairs = taken_in_turn(
        lambda: measured(lambda: prefill(ours, prompt)), lambda: measured(prefill_theirs), rounds=rounds, warm=0
    )
    return pair_rows(f"{count}-token prompt", pairs)


def prefill(model: Model, prompt: mx.array) -> mx.array:
    """Log-probabilities after a prompt, as a stage goes through it."""
    caches = model.make_cache()
    hidden = mx.zeros((0, model.args.hidden_size))
    for start in range(0, prompt.shape[0], CHUNK):
        tokens = prompt[start : start + CHUNK]
        is_end = start + CHUNK >= prompt.shape[0]
        hidden = model.forward_ragged(tokens, [(tokens.shape[0], caches)], asked=[int(is_end)])
        mx.eval(hidden, [cache.state for cache in caches])
    logits = model.logits(hidden[-1:])[0]
    return logits - mx.logsumexp(logits)


def budget_rows(folder: Path) -> list[Row]:
    """A pass under each budget: the peak beside weights, caches and inputs."""
    model = load(make_tiny(folder / "budgeted", recipe="plain", dtype="F32", seed=4, config=BUDGETED))
    new, cached = 512, 3584
    rows = []
    for budget_mib in BUDGETS_MIB:
        model.set_scratch_bytes(budget_mib * MIB)
        caches = filled(model, cached, room=new)
        tokens = mx.arange(new, dtype=mx.int32)
        mx.eval(tokens)
        run = measured(lambda tokens=tokens, caches=caches: model.forward_ragged(tokens, [(new, caches)]))  # type: ignore[misc]
        budget_bytes = budget_mib * MIB
        rows.append(
            Row(
                name=f"budget {budget_mib} MiB",
                ours=run.peak_bytes,
                theirs=budget_bytes,
                unit="bytes",
                ratio=run.peak_bytes / budget_bytes,
                bar=1.0,
                direction="at most",
                note=f"{run.time_s:.1f} s",
            )
        )
    return rows


def filled(model: Model, count: int, *, room: int) -> list[Any]:
    """Caches that hold random tokens, with room for more."""
    config: KimiConfig = model.args
    caches = model.make_cache()
    for cache in caches:
        widths = config.kv_lora_rank, config.qk_rope_head_dim
        cache.update_and_fetch(*(mx.random.normal((1, 1, count + room, width)) for width in widths))
        cache.offset = count
        mx.eval(cache.keys, cache.values)
    return caches


if __name__ == "__main__":
    sys.exit(main())
