"""One load in a process of its own: how long it took and how much memory it came to; prints one JSON line.

    python -m exo_kimi.bench.load_child ours|theirs|plain DIRECTORY START END

`theirs` is what mlx-lm's `sharded_load` does for a rank of a pipeline, with the rank that owns START:END given instead of
taken from `mx.distributed`. `plain` reads the same byte ranges as ours into one small buffer.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import StageManifest, resolve
from exo_kimi.runtime.loader import load_stage
from exo_kimi.runtime.tensor_reader import READ_BYTES, TensorReader


@dataclass(frozen=True, slots=True)
class Rank:
    """Stands for a group of mx.distributed."""

    index: int
    count: int

    def rank(self) -> int:
        """Which one; the first has the last layers."""
        return self.index

    def size(self) -> int:
        """How many."""
        return self.count


def main(arguments: Sequence[str]) -> None:
    """Load and report."""
    side, directory, start, end = arguments[0], Path(arguments[1]), int(arguments[2]), int(arguments[3])
    manifest = resolve(open_index(directory), start, end)
    mx.eval(mx.zeros(1))
    before_bytes = _resident("VmRSS")
    _forget_peak()
    started_s = time.perf_counter()
    held: Any = {"ours": _ours, "theirs": _theirs, "plain": _plain}[side](manifest)
    taken_s = time.perf_counter() - started_s
    peak_bytes = _resident("VmHWM") - before_bytes
    own_bytes = sum(value.nbytes for _, value in tree_flatten(held.parameters())) if side != "plain" else held
    print(json.dumps({"seconds": taken_s, "peak_bytes": peak_bytes, "own_bytes": own_bytes}))


def _ours(manifest: StageManifest) -> Any:
    fresh = resolve(open_index(manifest.directory), manifest.start_layer, manifest.end_layer)
    return load_stage(fresh, fuse=True)


def _theirs(manifest: StageManifest) -> Any:
    layers = manifest.config.num_hidden_layers
    model, _ = load_model(manifest.directory, lazy=True, strict=False)
    count = layers // (manifest.end_layer - manifest.start_layer)
    if count > 1:
        model.model.pipeline(Rank((layers - manifest.end_layer) * count // layers, count))
    mx.eval(model.parameters())
    return model


def _plain(manifest: StageManifest) -> int:
    buffer = memoryview(bytearray(READ_BYTES))
    entries = [entry for source in manifest.sources for parts in source.parts.values() for entry in parts]
    with TensorReader(manifest.directory) as reader:
        for entry in sorted(entries, key=lambda entry: (entry.file, entry.start)):
            for skip in range(0, entry.nbytes, READ_BYTES):
                reader.read_into(buffer[: min(READ_BYTES, entry.nbytes - skip)], entry, skip)
    return manifest.disk_bytes


def _resident(name: str) -> int:
    """Bytes of a line of /proc/self/status; elsewhere the most that the process ever held."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = re.search(rf"^{name}:\s+(\d+) kB", status.read_text(encoding="utf-8"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _forget_peak() -> None:
    """Let VmHWM start anew from what is resident now."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
