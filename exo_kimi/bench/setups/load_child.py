"""One load, in a process of its own: how long it took and how much memory it came to.

    python -m exo_kimi.bench.setups.load_child ours|theirs|plain|fresh DIRECTORY START END

prints it as one JSON line. `theirs` is what mlx-lm's `sharded_load` does for a rank of a pipeline, with the rank that owns
START:END given instead of taken from `mx.distributed`. `plain` reads the same byte ranges as ours into one small buffer,
`fresh` into memory that nothing has touched yet, as every load must that keeps what it reads.
"""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import re
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.models.deepseek_v3  # noqa: F401  theirs imports it while it loads, ours has its own model by then
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from exo_kimi.checkpoint.index import TensorEntry, open_index
from exo_kimi.checkpoint.manifest import StageManifest, resolve
from exo_kimi.runtime.loading.loader import load_stage
from exo_kimi.runtime.loading.tensor_reader import READ_BYTES, TensorReader


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


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedChild:
    """What one load took: seconds, the most memory beside what was resident before, and the bytes it was asked for."""

    seconds: float
    peak_bytes: int
    own_bytes: int

    @property
    def gb_per_s(self) -> float:
        """Its bytes over its time."""
        return self.own_bytes / self.seconds / 1e9


def load_once(side: str, directory: Path, start: int, end: int) -> LoadedChild:
    """Load in this process, in which nothing was loaded before. Imports and the start of MLX are not counted."""
    manifest = resolve(open_index(directory), start, end)
    mx.eval(mx.zeros(1))
    before_bytes = _resident("VmRSS")
    _forget_peak()
    started_s = time.perf_counter()
    held: Any = {"ours": _ours, "theirs": _theirs, "plain": _plain, "fresh": _fresh}[side](manifest)
    seconds = time.perf_counter() - started_s
    peak_bytes = _resident("VmHWM") - before_bytes
    model = side in ("ours", "theirs")
    own_bytes = sum(value.nbytes for _, value in tree_flatten(held.parameters())) if model else manifest.disk_bytes
    return LoadedChild(seconds=seconds, peak_bytes=peak_bytes, own_bytes=own_bytes)


def _ours(manifest: StageManifest) -> Any:
    fresh = resolve(open_index(manifest.directory), manifest.start_layer, manifest.end_layer)
    return load_stage(fresh, fuse=True, alone=True)


def _theirs(manifest: StageManifest) -> Any:
    layers = manifest.config.num_hidden_layers
    model, _ = load_model(manifest.directory, lazy=True, strict=False)
    count = layers // (manifest.end_layer - manifest.start_layer)
    if count > 1:
        model.model.pipeline(Rank((layers - manifest.end_layer) * count // layers, count))
    mx.eval(model.parameters())
    return model


def _plain(manifest: StageManifest) -> None:
    buffer = memoryview(bytearray(READ_BYTES))
    with TensorReader(manifest.directory) as reader:
        for entry in _in_file_order(manifest):
            for skip in range(0, entry.nbytes, READ_BYTES):
                size = min(READ_BYTES, entry.nbytes - skip)
                reader.read_into(buffer[:size], entry, skip)


def _fresh(manifest: StageManifest) -> Any:
    memory, end = mmap.mmap(-1, manifest.disk_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), 0
    data = memoryview(memory)
    with TensorReader(manifest.directory) as reader:
        for entry in _in_file_order(manifest):
            reader.read_scattered([data[end : end + entry.nbytes]], entry)
            end += entry.nbytes
        reader.wait()
    return data


def _in_file_order(manifest: StageManifest) -> list[TensorEntry]:
    entries = [entry for source in manifest.sources for parts in source.parts.values() for entry in parts]
    return sorted(entries, key=lambda entry: (entry.file, entry.start))


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
    side, directory, start, end = sys.argv[1:]
    print(json.dumps(asdict(load_once(side, Path(directory), int(start), int(end)))))
