"""What a stage process does with MLX: load layers, run steps, report memory; it knows nothing of sockets.

Everything here runs in the thread that made the backend, for MLX's streams belong to threads.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import mlx.core as mx

from exo_kimi.arch.geometry import kv_bytes_per_token
from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import resolve
from exo_kimi.errors import CheckpointError, StageError
from exo_kimi.models.kimi_k2 import CACHE_STEP, Model
from exo_kimi.runtime.fingerprint import stage_fingerprint
from exo_kimi.runtime.loader import load_stage
from exo_kimi.runtime.memory import FreeMemory, free_memory
from exo_kimi.runtime.messages import Load, Loaded
from exo_kimi.runtime.stage import StageWorker
from exo_kimi.runtime.steps import Step, StepResult


class Backend(Protocol):
    """The work of one stage, for one thread."""

    def load(self, order: Load, progress: Callable[[int, int], None]) -> Loaded:
        """Hold these layers and no others; `progress` gets (done, total) bytes."""
        ...

    def unload(self) -> None:
        """Give all memory back."""
        ...

    def reset(self, epoch: int) -> None:
        """Drop every sequence and take the steps of an epoch."""
        ...

    def execute(self, step: Step) -> Step | StepResult:
        """Run a step."""
        ...

    def held(self) -> tuple[int, int]:
        """Bytes of all caches, and how many sequences there are."""
        ...

    def memory(self) -> tuple[int, int]:
        """Bytes in use, and the most since the process started."""
        ...

    def free(self) -> FreeMemory:
        """What could still be allocated."""
        ...


class MlxBackend:
    """Layers of a checkpoint in MLX.

    Args:
        directory: this machine's checkpoint, which may hold this stage's tensors only; None takes the leader's path.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._worker: StageWorker | None = None
        self._loaded: tuple[Load, Loaded] | None = None

    def load(self, order: Load, progress: Callable[[int, int], None]) -> Loaded:
        """Load a stage, unless it is the one that is held.

        Raises:
            CheckpointError: the directory does not hold these layers, or holds others than the leader's.
            StageOutOfMemoryError, RuntimeError: see `load_stage`.
        """
        if self._loaded is not None and self._loaded[0] == order:
            return self._loaded[1]
        self.unload()
        directory = self._directory or Path(order.directory)
        manifest = resolve(open_index(directory), order.start_layer, order.end_layer)
        found = stage_fingerprint(manifest)
        if found != order.fingerprint:
            raise CheckpointError(
                f"layers {order.start_layer}:{order.end_layer} are not those of the leader's checkpoint",
                expected=f"fingerprint {order.fingerprint[:16]} (leader, {order.directory})",
                found=f"fingerprint {found[:16]}",
                where=directory,
                fix="copy the leader's checkpoint to this machine, or give the right folder with --model",
            )
        model: Model = load_stage(manifest, dtype=order.dtype, progress=progress, fuse=True)
        if mx.metal.is_available():
            # Wired, so that weights that rest between requests are not paged out.
            mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
        self._worker = StageWorker(model, epoch=0, stage=order.stage)
        loaded = Loaded(
            start_layer=order.start_layer,
            end_layer=order.end_layer,
            weights_bytes=mx.get_active_memory(),
            cache_step=CACHE_STEP,
            kv_bytes_per_token=kv_bytes_per_token(
                manifest.config,
                order.start_layer,
                order.end_layer,
                bytes_per_element=model.layers[0].input_layernorm.weight.dtype.size,
            ),
        )
        self._loaded = order, loaded
        return loaded

    def unload(self) -> None:
        self._worker = None
        self._loaded = None
        gc.collect()  # modules refer to each other: their arrays would wait for the collector
        mx.clear_cache()

    def reset(self, epoch: int) -> None:
        self._require().reset(epoch)

    def execute(self, step: Step) -> Step | StepResult:
        return self._require().execute(step)

    def held(self) -> tuple[int, int]:
        return (self._worker.kv_nbytes, self._worker.sequences) if self._worker is not None else (0, 0)

    def memory(self) -> tuple[int, int]:
        return mx.get_active_memory(), mx.get_peak_memory()

    def free(self) -> FreeMemory:
        return free_memory()

    def _require(self) -> StageWorker:
        if self._worker is None:
            raise StageError("this stage holds no layers")
        return self._worker
