"""One stage's layers, resident in this machine's memory: loaded strictly, wired, counted, and given back."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import mlx.core as mx

from exo_kimi.checkpoint.adapters.manifest import AdapterManifest
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.drafts.manifest import DraftManifest
from exo_kimi.checkpoint.manifest import StageManifest
from exo_kimi.checkpoint.vision import VisionManifest
from exo_kimi.errors import StageOutOfMemoryError
from exo_kimi.experts.budget import ExpertCache
from exo_kimi.models.draft_head import DraftHead
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.models.vision import VisionModel
from exo_kimi.runtime.loading.adapters import adapted_view
from exo_kimi.runtime.loading.draft import load_draft_head
from exo_kimi.runtime.loading.loader import load_stage
from exo_kimi.runtime.loading.vision import load_tower
from exo_kimi.runtime.stage.memory import free_memory
from exo_kimi.runtime.stage.worker import as_fault
from exo_kimi.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ResidentStage:
    """Layers that are in memory for as long as this object is; call `give_back_memory` once it and its caches are let go.

    Args:
        manifest: what was loaded.
        model: these layers, ready to run.
        resident_bytes: by how much MLX's memory grew.
        load_s: how long loading took.
        vision: the tower for pictures, if this stage holds one.
        draft: the draft head, if this stage, the last, holds one; `draft_fingerprint` is of its files.
        adapted: the same layers with each adapter, by name; all but the adapters' own arrays is shared.
    """

    manifest: StageManifest
    model: Model
    resident_bytes: int
    load_s: float
    vision: VisionModel | None = None
    draft: DraftHead | None = None
    draft_fingerprint: str | None = None
    adapted: Mapping[str, Model] = field(default_factory=dict)

    @property
    def dtype(self) -> mx.Dtype:
        """Of activations."""
        dtype: mx.Dtype = self.model.layers[0].input_layernorm.weight.dtype
        return dtype

    @classmethod
    def load(
        cls,
        manifest: StageManifest,
        *,
        stage: int,
        dtype: str | None = None,
        progress: Callable[[int, int], None] | None = None,
        fuse: bool = False,
        alone: bool = False,
        vision: VisionManifest | None = None,
        expert_cache: ExpertCache | None = None,
        draft: DraftManifest | None = None,
        adapters: Mapping[str, AdapterManifest] | None = None,
    ) -> ResidentStage:
        """Load the layers of a manifest, in the thread that will run them: MLX's streams belong to threads.

        Args:
            manifest: of the layers.
            stage: its index, for errors.
            dtype, progress, fuse, alone, expert_cache: see `load_stage`.
            vision: the tower to load with them.
            draft: the draft head to load with them.
            adapters: those to load with them, by name.

        Raises:
            CheckpointError: the tensors are not what the manifest says.
            StageError, StageOutOfMemoryError: MLX could not hold them.
            UsageError: an expert cache that is too small.
        """
        began_s, before_bytes = time.monotonic(), mx.get_active_memory()
        try:
            model = load_stage(
                manifest, dtype=dtype, progress=progress, fuse=fuse, alone=alone, expert_cache=expert_cache
            )
            tower = load_tower(vision, dtype=dtype) if vision is not None else None
            head = None
            if draft is not None:
                target = Checkpoint(manifest.directory)
                head = load_draft_head(draft.directory, target, model=model, dtype=dtype)
                head.set_dtype(model.layers[0].input_layernorm.weight.dtype)
            adapted = {name: adapted_view(model, each) for name, each in (adapters or {}).items()}
        except (RuntimeError, ValueError, MemoryError) as error:  # what MLX raises
            raise as_fault(error, stage=stage) from error
        if mx.metal.is_available():
            # Wired, so that weights that rest between requests are not paged out.
            mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
        return cls(
            manifest=manifest,
            model=model,
            resident_bytes=mx.get_active_memory() - before_bytes,
            load_s=time.monotonic() - began_s,
            vision=tower,
            draft=head,
            draft_fingerprint=None if draft is None else draft.fingerprint,
            adapted=adapted,
        )


def check_room(manifest: StageManifest, *, stage: int, where: str) -> None:
    """Refuse layers that are larger than the memory that is free now.

    Args:
        manifest: of the layers.
        stage: its index, for the error.
        where: the machine, for the error.

    Raises:
        StageOutOfMemoryError: they do not fit.
    """
    free_bytes = free_memory().free_bytes
    if manifest.resident_bytes > free_bytes:
        raise StageOutOfMemoryError(
            f"layers {manifest.start_layer}:{manifest.end_layer} do not fit into this machine's memory now",
            stage=stage,
            expected=f"at most {format_bytes(free_bytes)}",
            found=format_bytes(manifest.resident_bytes),
            where=where,
            fix="close other programs; on a Mac raise the limit as the plan says (`sudo sysctl iogpu.wired_limit_mb=N`)",
        )


def give_back_memory() -> None:
    """Return to the system the memory of what was let go, such as a stage and its caches."""
    gc.collect()  # modules refer to each other: their arrays would wait for the collector
    mx.clear_cache()
