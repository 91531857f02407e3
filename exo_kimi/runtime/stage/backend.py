"""A stage's work in MLX: the layers that a leader asks for, the worker that runs their steps, and prefixes on disk.

Everything here runs in the thread that made the backend, for MLX's streams belong to threads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import mlx.core as mx

from exo_kimi.arch.draft_modules import draft_kv_bytes_per_token
from exo_kimi.arch.geometry import kv_bytes_per_token, served_state_bytes, state_bytes_per_sequence
from exo_kimi.checkpoint.adapters.config import read_adapter_config
from exo_kimi.checkpoint.adapters.manifest import AdapterManifest, resolve_for
from exo_kimi.checkpoint.drafts.manifest import DraftManifest, resolve_draft
from exo_kimi.checkpoint.fingerprint import stage_fingerprint
from exo_kimi.checkpoint.index import CheckpointIndex, open_index
from exo_kimi.checkpoint.manifest import StageManifest, resolve
from exo_kimi.checkpoint.vision import NoVision, VisionManifest, find_vision
from exo_kimi.errors import CheckpointError, StageError
from exo_kimi.experts.budget import ExpertCache
from exo_kimi.models import ops
from exo_kimi.models.kimi_k2 import CACHE_STEP
from exo_kimi.runtime.protocol.messages import Join, Load, Loaded, decode_path
from exo_kimi.runtime.requests import ExpertHealth
from exo_kimi.runtime.reserve import MOST_WAITING_ROWS, default_scratch_bytes
from exo_kimi.runtime.stage.drafting import DraftRunner
from exo_kimi.runtime.stage.memory import FreeMemory, free_memory
from exo_kimi.runtime.stage.pictures import PictureTower
from exo_kimi.runtime.stage.prefix_disk import (
    Changed,
    OpenedDisk,
    PrefixDisk,
    cache_identity,
    default_directory,
    make_blocks_private,
)
from exo_kimi.runtime.stage.resident import ResidentStage, give_back_memory
from exo_kimi.runtime.stage.route_recorder import RouteRecorder
from exo_kimi.runtime.stage.stage_model import expert_health
from exo_kimi.runtime.stage.warmup import warm_up
from exo_kimi.runtime.stage.worker import StageWorker
from exo_kimi.runtime.steps import HeldCaches, Step, StepResult
from exo_kimi.units import format_bytes

logger = logging.getLogger(__name__)


class LayerSource(Protocol):
    """Where a backend's layers come from."""

    def take(self, order: Load, progress: Callable[[int, int], None]) -> ResidentStage:
        """The layers that an order asks for; called when the backend holds none.

        Raises:
            CheckpointError: these layers are not to be had here.
            RuntimeFault: they cannot be held.
        """
        ...

    def drop(self) -> None:
        """Let go of what `take` gave, if it is still held here: the backend has no more use for it."""
        ...


class CheckpointLayers:
    """Layers that are read from a checkpoint when a leader asks for them.

    Args:
        directory: this machine's checkpoint, which may hold this stage's tensors only; None takes the leader's path.
        alone: no other thread of the process uses MLX, see `load_stage`.
        expert_cache: of this machine; None takes what the leader's order says.
        draft_directory: this machine's draft head; None takes the leader's path.
    """

    def __init__(
        self,
        directory: Path | None,
        *,
        alone: bool = False,
        expert_cache: ExpertCache | None = None,
        draft_directory: Path | None = None,
    ) -> None:
        self._directory = directory
        self._draft_directory = draft_directory
        self._alone = alone
        self._expert_cache = expert_cache

    def take(self, order: Load, progress: Callable[[int, int], None]) -> ResidentStage:
        """Load a stage, once the memory of the one before is free.

        Raises:
            CheckpointError: the directory does not hold these layers, or holds others than the leader's.
            StageError, StageOutOfMemoryError: see `ResidentStage.load`.
        """
        give_back_memory()
        directory = self._directory or decode_path(order.directory)
        index = open_index(directory)
        manifest = resolve(index, order.start_layer, order.end_layer)
        found = stage_fingerprint(manifest)
        if found != order.fingerprint:
            raise CheckpointError(
                f"layers {order.start_layer}:{order.end_layer} are not those of the leader's checkpoint",
                expected=f"fingerprint {order.fingerprint[:16]} (leader, {decode_path(order.directory)})",
                found=f"fingerprint {found[:16]}",
                where=directory,
                fix="copy the leader's checkpoint to this machine, or give the right folder with --model",
            )
        return ResidentStage.load(
            manifest,
            stage=order.stage,
            dtype=order.dtype,
            progress=progress,
            fuse=True,
            alone=self._alone,
            vision=_vision(index, order),
            expert_cache=self._expert_cache or order.expert_cache(),
            draft=_draft(order, self._draft_directory),
            adapters=_adapters(order, manifest),
        )

    def drop(self) -> None:
        """Nothing is kept here."""


def _vision(index: CheckpointIndex, order: Load) -> VisionManifest | None:
    if not order.vision:
        return None
    found = find_vision(index, None if order.vision_directory is None else decode_path(order.vision_directory))
    if isinstance(found, NoVision):
        raise CheckpointError(
            "this machine's checkpoint has no vision tower, and the leader's has",
            found=found.reason,
            where=index.directory,
            fix="copy the tower's tensors to this machine, or serve text alone with --no-vision",
        )
    return found


def _draft(order: Load, directory: Path | None) -> DraftManifest | None:
    if order.draft_directory is None:
        return None
    found = resolve_draft(directory or decode_path(order.draft_directory))
    if found.fingerprint != order.draft_fingerprint:
        raise CheckpointError(
            "this machine's draft head is not the leader's",
            expected=f"fingerprint {(order.draft_fingerprint or '')[:16]} (leader, {decode_path(order.draft_directory)})",
            found=f"fingerprint {found.fingerprint[:16]}",
            where=found.directory,
            fix="copy the leader's head to this machine, or give the right folder with --draft",
        )
    return found


def _adapters(order: Load, stage: StageManifest) -> dict[str, AdapterManifest]:
    found = {}
    for each in order.adapters:
        directory = decode_path(each.directory)
        adapter = resolve_for(directory, read_adapter_config(directory), stage.config)
        if adapter.fingerprint != each.fingerprint:
            raise CheckpointError(
                f"adapter {each.name!r} on this machine is not the leader's",
                expected=f"fingerprint {each.fingerprint[:16]} (leader)",
                found=f"fingerprint {adapter.fingerprint[:16]}",
                where=directory,
                fix="copy the leader's adapter to this machine, under the same path",
            )
        found[each.name] = adapter
    return found


@dataclass(slots=True)
class _LoadedStage:
    """What a backend has once a Load was carried out."""

    order: Load
    answer: Loaded
    resident: ResidentStage
    worker: StageWorker
    disk_settings: tuple[int, int, str | None] | None = None
    is_warm: bool = False
    recorder: RouteRecorder | None = None

    def close_disk(self) -> None:
        self.disk_settings = None
        if self.worker.disk is not None:
            self.worker.disk.close()
            self.worker.disk = None


class MlxBackend:
    """Runs the layers of one stage in MLX: the `Backend` of stage processes and of exo's runners.

    Args:
        layers: where they come from.
        warms: whether `warm_up` runs anything; None: where kernels are compiled when they are first asked for, on GPUs.
        expert_trace: this machine's file for which experts are asked for; None takes what the leader's order says.
    """

    def __init__(self, layers: LayerSource, *, warms: bool | None = None, expert_trace: Path | None = None) -> None:
        self._layers = layers
        self._expert_trace = expert_trace
        self._warms = not ops.on_cpu() if warms is None else warms
        self._loaded: _LoadedStage | None = None
        self._progress: Callable[[], None] | None = None

    def load(self, order: Load, progress: Callable[[int, int], None]) -> Loaded:
        """Take the layers of an order, unless they are those that are held.

        Raises:
            CheckpointError, RuntimeFault: see `LayerSource.take`.
        """
        if self._loaded is not None and self._loaded.order == order:
            return self._loaded.answer
        self._let_go()
        resident = self._layers.take(order, progress)
        model = resident.model
        scratch_bytes = order.scratch_bytes or default_scratch_bytes(self.free().free_bytes)
        # Metal runs a graph while the next is built: what one has let go, the other may still hold.
        for each in (model, *resident.adapted.values()):
            each.set_scratch_bytes(scratch_bytes // 2 if mx.metal.is_available() else scratch_bytes)
        model.set_kv_bits(order.kv_bits)
        tower = None
        if resident.vision is not None:
            tower = PictureTower(resident.vision)
            tower.model.scratch_bytes = model.scratch_bytes
        drafts = None
        draft_bytes = 0
        waiting_rows = MOST_WAITING_ROWS if order.draft_waiting_rows is None else order.draft_waiting_rows
        if resident.draft is not None and order.feature_layers:
            head = resident.draft
            head.set_scratch_bytes(model.scratch_bytes)
            drafts = DraftRunner(head, vocab_size=model.args.vocab_size, most_waiting=waiting_rows)
            draft_bytes = draft_kv_bytes_per_token(head.config, bytes_per_element=resident.dtype.size)
        row_bytes = resident.dtype.size * model.args.hidden_size * len(order.feature_layers)
        answer = Loaded(
            start_layer=order.start_layer,
            end_layer=order.end_layer,
            weights_bytes=mx.get_active_memory(),
            cache_step=CACHE_STEP,
            kv_bytes_per_token=kv_bytes_per_token(
                resident.manifest.config,
                order.start_layer,
                order.end_layer,
                bytes_per_element=resident.dtype.size,
                kv_bits=order.kv_bits,
            )
            + draft_bytes,
            waiting_bytes=0 if drafts is None else waiting_rows * row_bytes,
            state_bytes=served_state_bytes(
                resident.manifest.config,
                order.start_layer,
                order.end_layer,
                bytes_per_element=resident.dtype.size,
            ),
            snapshot_bytes=state_bytes_per_sequence(
                resident.manifest.config,
                order.start_layer,
                order.end_layer,
                bytes_per_element=resident.dtype.size,
            ),
        )
        if model.streamed is not None:
            model.streamed.store.on_progress = self._progress
        path = self._trace_of(order)
        # Running ahead would keep the stage from the next order for as long as reading takes, and trace what nobody asked for.
        worker = StageWorker(
            model,
            epoch=0,
            stage=order.stage,
            tower=tower,
            ahead=model.streamed is None and path is None,
            feature_layers=order.feature_layers,
            drafts=drafts,
            adapted=resident.adapted,
        )
        self._loaded = _LoadedStage(order, answer, resident, worker)
        return answer

    def warm_up(self, after: Callable[[int], None]) -> int:
        """Run every kind of pass once (see `warmup`), unless these layers are warm.

        Raises:
            StageError, StageOutOfMemoryError: see `warmup.warm_up`.
        """
        loaded = self._require()
        if not self._warms or loaded.is_warm:
            return 0
        passes = warm_up(loaded.worker, loaded.resident.model, after=after)
        loaded.is_warm = True
        return passes

    def unload(self) -> None:
        self._let_go()
        self._layers.drop()
        give_back_memory()

    def _let_go(self) -> None:
        if self._loaded is not None:
            self._loaded.close_disk()
            if self._loaded.recorder is not None:
                self._loaded.recorder.close()
            self._loaded = None

    def reset(self, epoch: int, *, keep: bool = False) -> tuple[HeldCaches, ...]:
        loaded = self._require()
        held: tuple[HeldCaches, ...] = ()
        if keep:
            held = loaded.worker.keep(epoch)
        else:
            loaded.worker.reset(epoch)
        path = self._trace_of(loaded.order)
        if path is not None and loaded.recorder is None:  # what warmed the stage up is no trace of anybody's texts
            loaded.recorder = RouteRecorder(loaded.resident.model, path)
            loaded.worker.asks_all = loaded.recorder.is_recording
        return held

    def _trace_of(self, order: Load) -> Path | None:
        return self._expert_trace or (None if order.expert_trace is None else decode_path(order.expert_trace))

    def open_disk(self, order: Join, changed: Changed) -> OpenedDisk:
        """What the disk does not allow is a warning: without it everything works, only restarts are slower."""
        loaded = self._require()
        worker = loaded.worker
        settings = order.block_tokens, order.prefix_disk_bytes, order.prefix_directory
        if settings != loaded.disk_settings:
            loaded.close_disk()
        if not order.prefix_disk_bytes:
            make_blocks_private(default_directory())  # of a server that kept some
        elif worker.disk is None:
            try:
                worker.disk = _make_disk(loaded, order, changed)
                if not worker.disk.capacity_snapshots:
                    needed = format_bytes(loaded.answer.snapshot_bytes)
                    logger.warning(
                        "no prefix is kept on disk: a snapshot of this stage's states takes %s there", needed
                    )
                loaded.disk_settings = settings
            except OSError as error:
                where = error.filename or decode_path(order.prefix_directory or "")
                logger.warning("no prefix is kept on this machine's disk: %s: %s", where, error.strerror)
        return OpenedDisk.of(worker.disk)

    def execute(self, step: Step) -> Step | StepResult:
        loaded = self._require()
        try:
            return loaded.worker.execute(step)
        finally:
            if loaded.recorder is not None:
                loaded.recorder.write()

    def run_ahead(self) -> None:
        self._require().worker.run_ahead()

    def held(self) -> tuple[int, int]:
        return (0, 0) if self._loaded is None else (self._loaded.worker.kv_nbytes, self._loaded.worker.sequences)

    def memory(self) -> tuple[int, int]:
        return mx.get_active_memory(), mx.get_peak_memory()

    def free(self) -> FreeMemory:
        return free_memory()

    def experts(self) -> ExpertHealth | None:
        streamed = self._loaded.resident.model.streamed if self._loaded is not None else None
        return None if streamed is None else expert_health(streamed)

    def tell_progress(self, progress: Callable[[], None]) -> None:
        self._progress = progress

    def _require(self) -> _LoadedStage:
        if self._loaded is None:
            raise StageError("this stage holds no layers")
        return self._loaded


def _make_disk(loaded: _LoadedStage, order: Join, changed: Changed) -> PrefixDisk:
    load = loaded.order
    kinds = dict.fromkeys(
        (type(cache).__name__, getattr(cache, "bits", "")) for cache in loaded.worker.model.make_cache()
    )
    fingerprint = stage_fingerprint(loaded.resident.manifest)
    if loaded.worker.drafts is not None:
        fingerprint += f" and head {loaded.resident.draft_fingerprint}"  # whose entries lie in the blocks
    identity = cache_identity(
        fingerprint=fingerprint,
        start_layer=load.start_layer,
        end_layer=load.end_layer,
        dtype=str(loaded.resident.dtype),
        kv_format=", ".join(f"{name} {bits}" for name, bits in kinds),
        block_tokens=order.block_tokens,
    )
    parent = decode_path(order.prefix_directory).expanduser() if order.prefix_directory else default_directory()
    return PrefixDisk(
        parent,
        identity,
        block_bytes=loaded.answer.kv_bytes_per_token * order.block_tokens,
        disk_bytes=order.prefix_disk_bytes,
        snapshot_bytes=loaded.answer.snapshot_bytes,
        changed=changed,
    )
