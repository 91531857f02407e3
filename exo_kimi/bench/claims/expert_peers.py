"""Experts from disk against mlx-vlm's expert offload: the same checkpoint, budget and prompt, each in a process of its own.

    exo-kimi bench expert-peers --peer PYTHON [--rounds N]

PYTHON is that of an environment with mlx-vlm. Ratios: tokens/s, ours over theirs, and the first token, theirs over ours, at
least 1; bytes read while decoding and the most that MLX held, ours over theirs, at most 1. Seconds of the processor, theirs over
ours, say on a busy machine what the clock does not. Everything comes from the page cache: the disk is not measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from exo_kimi.bench.frame import Result, Row, finish, taken_in_turn
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.experts.layout import layouts_of

SHAPE: dict[str, Any] = {
    "num_hidden_layers": 5,
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "moe_intermediate_size": 512,
    "n_routed_experts": 64,
    "num_experts_per_tok": 8,
}
SHARES = (0.25, 0.5)
PROMPT, NEW = 64, 48
LIMIT_S = 300.0
THEIRS = Path(__file__).parents[1] / "setups" / "streamed_theirs.py"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it, print a table and one JSON line."""
    parser = argparse.ArgumentParser(
        prog="exo-kimi bench expert-peers", description="experts from disk against mlx-vlm's"
    )
    parser.add_argument("--peer", metavar="PYTHON", help="of an environment with mlx-vlm")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs at each budget (default 3)")
    options = parser.parse_args(arguments)
    return finish(measure(options.peer, options.rounds), options)


def measure(peer: str | None, rounds: int) -> Result:
    """Rows of each budget."""
    if peer is None:
        return Result(bench="expert-peers", skipped="no --peer: the Python of an environment with mlx-vlm")
    version = _run([peer, "-c", "from importlib.metadata import version; print(version('mlx-vlm'))"]).strip()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, offloaded = Path(folder) / "checkpoint", Path(folder) / "offloaded"
        _write(checkpoint)
        _run([peer, "-m", "mlx_vlm.moe_offload", "--build", str(checkpoint), "--out", str(offloaded)])
        layouts = layouts_of(Checkpoint(checkpoint).manifest().sources, floats="F32")
        whole_bytes = sum(layout.experts * layout.slot_bytes for layout in layouts.values())
        prompt = json.dumps(np.random.default_rng(0).integers(5, 200, PROMPT).tolist())
        rows: list[Row] = []
        for share in SHARES:
            budget = round(share * whole_bytes)
            ours = [sys.executable, "-m", "exo_kimi.bench.setups.streamed_ours", str(checkpoint), str(budget)]
            theirs = [peer, str(THEIRS), str(offloaded), str(budget / 1e9)]
            runs = [partial(_figures, [*words, prompt, str(NEW)]) for words in (ours, theirs)]
            rows += _rows(share, taken_in_turn(*runs, rounds=rounds, warm=1))
    shape = f"{SHAPE['n_routed_experts']} experts, top {SHAPE['num_experts_per_tok']}, {len(layouts)} layers"
    note = f"{shape}, {whole_bytes / 1e6:.0f} MB of them in 4 bits; {PROMPT} tokens in, {NEW} out; float32, page cache"
    return Result(bench="expert-peers", against=f"mlx-vlm {version}", rows=rows, notes=[note])


def _rows(share: float, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> list[Row]:
    name = f"{share:.0%} of experts"
    equal = all(ours["tokens"] == theirs["tokens"] for ours, theirs in pairs)

    def both(key: str, per: float | None = None) -> list[tuple[float, float]]:
        return [tuple(one[key] if per is None else per / one[key] for one in pair) for pair in pairs]

    hits = [[one["hits"] / (one["hits"] + one["misses"]) for one in pair] for pair in pairs][-1]
    return [
        Row.of_pairs(
            f"{name}, decode",
            both("decode_s", NEW),
            unit="tokens/s",
            inverse=True,
            bar=1.0,
            note=f"hit rates {hits[0]:.2f}, {hits[1]:.2f}",
            equal=equal,
        ),
        Row.of_pairs(f"{name}, read", both("read_bytes"), unit="bytes", inverse=True, bar=1.0, direction="at most"),
        Row.of_pairs(f"{name}, first token", both("prefill_s"), unit="s", bar=1.0),
        Row.of_pairs(f"{name}, first token, processor", both("prefill_cpu_s"), unit="s"),
        Row.of_pairs(f"{name}, decode, processor", both("decode_cpu_s"), unit="s"),
        Row.of_pairs(f"{name}, peak", both("peak_bytes"), unit="bytes", inverse=True, bar=1.0, direction="at most"),
    ]


def _write(directory: Path) -> None:
    """A checkpoint that both read as it is: on a CPU, scales in bf16 would be an artefact of the backend's."""
    make_tiny(directory, recipe="uniform-4", shards=1, absorbed=True, config=SHAPE)
    path = directory / "model.safetensors"
    tensors = mx.load(str(path))
    assert isinstance(tensors, dict)
    wide = {name: each.astype(mx.float32) if each.dtype == mx.bfloat16 else each for name, each in tensors.items()}
    mx.eval(wide)
    mx.save_safetensors(str(directory / "wide.safetensors"), wide, metadata={"format": "mlx"})
    (directory / "wide.safetensors").rename(path)


def _figures(words: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_run(words).splitlines()[-1])
    return found


def _run(words: Sequence[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words[:3])} ended with {done.returncode}: {done.stderr[-500:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
