"""What a stage process does with MLX: load layers, run steps, report memory; it knows nothing of sockets.

Everything here runs in the thread that made the backend, for MLX's streams belong to threads.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import mlx.core as mx

from exo_kimi.arch.geometry import kv_bytes_per_token
from exo_kimi.checkpoint.fingerprint import stage_fingerprint
from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import resolve
from exo_kimi.errors import CheckpointError, StageError
from exo_kimi.models.kimi_k2 import CACHE_STEP, Model
from exo_kimi.runtime.loading.loader import load_stage
from exo_kimi.runtime.protocol.messages import Join, Load, Loaded
from exo_kimi.runtime.reserve import default_scratch_bytes
from exo_kimi.runtime.stage.memory import FreeMemory, free_memory
from exo_kimi.runtime.stage.prefix_disk import Changed, PrefixDisk, cache_identity, default_directory
from exo_kimi.runtime.stage.worker import StageWorker
from exo_kimi.runtime.steps import Step, StepResult

logger = logging.getLogger(__name__)


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

    def open_disk(self, order: Join, changed: Changed) -> tuple[int, tuple[str, ...]]:
        """Keep prefixes on disk as an order says, or none.

        Returns:
            For how many blocks there is room, and the keys of those that are there.
        """
        ...

    def execute(self, step: Step) -> Step | StepResult:
        """Run a step."""
        ...

    def run_ahead(self) -> None:
        """The answer is on its way: begin with what will be asked next, if that is known."""
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
        alone: no other thread of the process uses MLX, see `load_stage`.
    """

    def __init__(self, directory: Path | None, *, alone: bool = False) -> None:
        self._directory = directory
        self._alone = alone
        self._worker: StageWorker | None = None
        self._loaded: tuple[Load, Loaded] | None = None
        self._disk_terms: tuple[int, int, str | None] | None = None

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
        model: Model = load_stage(manifest, dtype=order.dtype, progress=progress, fuse=True, alone=self._alone)
        if mx.metal.is_available():
            # Wired, so that weights that rest between requests are not paged out.
            mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
        scratch_bytes = order.scratch_bytes or default_scratch_bytes(self.free().free_bytes)
        # Metal runs a graph while the next is built: what one has let go, the other may still hold.
        model.set_scratch_bytes(scratch_bytes // 2 if mx.metal.is_available() else scratch_bytes)
        model.set_kv_bits(order.kv_bits)
        self._worker = StageWorker(model, epoch=0, stage=order.stage)
        self._dtype = model.layers[0].input_layernorm.weight.dtype
        loaded = Loaded(
            start_layer=order.start_layer,
            end_layer=order.end_layer,
            weights_bytes=mx.get_active_memory(),
            cache_step=CACHE_STEP,
            kv_bytes_per_token=kv_bytes_per_token(
                manifest.config,
                order.start_layer,
                order.end_layer,
                bytes_per_element=self._dtype.size,
                kv_bits=order.kv_bits,
            ),
        )
        self._loaded = order, loaded
        return loaded

    def unload(self) -> None:
        self._close_disk()
        self._worker = None
        self._loaded = None
        gc.collect()  # modules refer to each other: their arrays would wait for the collector
        mx.clear_cache()

    def reset(self, epoch: int) -> None:
        self._require().reset(epoch)

    def open_disk(self, order: Join, changed: Changed) -> tuple[int, tuple[str, ...]]:
        """What the disk does not allow is a warning: without it everything works, only restarts are slower."""
        worker = self._require()
        terms = order.block_tokens, order.prefix_disk_bytes, order.prefix_directory
        if terms != self._disk_terms:
            self._close_disk()
        if worker.disk is None and order.prefix_disk_bytes:
            try:
                worker.disk = self._make_disk(worker, order, changed)
                self._disk_terms = terms
            except OSError as error:
                where = error.filename or order.prefix_directory
                logger.warning("no prefix is kept on this machine's disk: %s: %s", where, error.strerror)
        return (worker.disk.capacity_blocks, worker.disk.keys()) if worker.disk is not None else (0, ())

    def _make_disk(self, worker: StageWorker, order: Join, changed: Changed) -> PrefixDisk:
        assert self._loaded is not None
        load, loaded = self._loaded
        cache = worker.model.make_cache()[0]
        identity = cache_identity(
            fingerprint=load.fingerprint,
            start_layer=load.start_layer,
            end_layer=load.end_layer,
            dtype=str(self._dtype),
            kv_format=f"{type(cache).__name__} {getattr(cache, 'bits', '')}",
            block_tokens=order.block_tokens,
        )
        parent = Path(order.prefix_directory).expanduser() if order.prefix_directory else default_directory()
        return PrefixDisk(
            parent,
            identity,
            block_bytes=loaded.kv_bytes_per_token * order.block_tokens,
            disk_bytes=order.prefix_disk_bytes,
            changed=changed,
        )

    def _close_disk(self) -> None:
        self._disk_terms = None
        if self._worker is not None and self._worker.disk is not None:
            self._worker.disk.close()
            self._worker.disk = None

    def execute(self, step: Step) -> Step | StepResult:
        return self._require().execute(step)

    def run_ahead(self) -> None:
        self._require().run_ahead()

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
