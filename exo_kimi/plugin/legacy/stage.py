"""This node's layers inside legacy exo: loaded strictly, run, and freed, all in one thread, for MLX's streams belong to threads.

They outlive exo's engine objects: exo makes a new one whenever a node comes or goes. It knows nothing of exo.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import StageManifest, resolve
from exo_kimi.errors import OverloadedError, ProtocolError, StageError, StageOutOfMemoryError
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.plugin.legacy.place import Place
from exo_kimi.plugin.legacy.plan import PinnedPlan
from exo_kimi.plugin.legacy.tensors import Array, given, taken
from exo_kimi.runtime.loading.loader import load_stage
from exo_kimi.runtime.stage.memory import free_memory
from exo_kimi.runtime.stage.worker import as_fault
from exo_kimi.units import format_bytes

SAY_EVERY_S = 10.0
IDLE_S = 600.0  # a sequence that nobody touched for this long was abandoned: exo does not say when a request ends badly


@dataclass(slots=True)
class _Held:
    caches: list[Any]
    length: int
    touched_s: float


class LegacyStage:
    """Layers of a checkpoint, as the plan gives them to this node.

    Args:
        directory: the checkpoint; this node's share of it is enough.
        pinned: the plan.
        say: takes lines for the user.
    """

    def __init__(self, directory: str, pinned: PinnedPlan, *, say: Callable[[str], None]) -> None:
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="exo-kimi")
        self.resident_bytes = 0
        self._directory, self._pinned, self._say = directory, pinned, say
        self._digest = pinned.digest
        self._model: Model | None = None
        self._held: dict[str, _Held] = {}

    @property
    def loaded(self) -> bool:
        """Whether the layers are here."""
        return self._model is not None

    @property
    def sequences(self) -> int:
        """How many have caches."""
        return len(self._held)

    def manifest(self) -> StageManifest:
        """This node's share, from the headers.

        Raises:
            CheckpointError: not these layers; what is missing is named.
        """
        seat = self._pinned.seat
        return resolve(open_index(self._directory), seat.start_layer, seat.end_layer)

    def load(self) -> bool:
        """Hold the layers; False when they were here already. In the thread.

        Raises:
            CheckpointError: they cannot be read.
            RuntimeFault: they do not fit, or MLX could not hold them.
        """
        if self._model is not None:
            return False
        seat, began_s = self._pinned.seat, time.monotonic()
        manifest = self.manifest()
        what = f"layers {seat.start_layer}:{seat.end_layer} of {self._pinned.name}"
        self._say(f"loading {what}, {format_bytes(manifest.disk_bytes)}")
        self._check_room(manifest)
        before_bytes = mx.get_active_memory()
        try:
            self._model = load_stage(manifest, progress=self._progress(what))
        except (RuntimeError, ValueError, MemoryError) as error:  # what MLX raises
            raise as_fault(error, stage=self._pinned.own) from error
        if mx.metal.is_available():
            # Wired, so that weights that rest between requests are not paged out.
            mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
        self.resident_bytes = mx.get_active_memory() - before_bytes
        self._say(
            f"holds {what}: {self.resident_bytes} bytes resident ({format_bytes(self.resident_bytes)}), "
            f"{time.monotonic() - began_s:.1f} s"
        )
        return True

    def unload(self) -> None:
        """Give all memory back. In the thread."""
        if self._model is not None:
            self._say(f"frees {self._pinned.name} ({format_bytes(self.resident_bytes)})")
        self._model, self.resident_bytes = None, 0
        self._held.clear()
        gc.collect()  # modules refer to each other: their arrays would wait for the collector
        mx.clear_cache()

    def release(self, request_id: str) -> None:
        """Drop a sequence that ended. In the thread."""
        if self._held.pop(request_id, None) is not None and not self._held:
            mx.clear_cache()

    def run(self, request_id: str, tensor: Array, place: Place) -> tuple[Array, Place]:
        """Tokens or hidden states through these layers. In the thread.

        Args:
            request_id: exo's.
            tensor: (1, L) token ids for the first stage, else (1, L, D) as `run` gave it on the stage before.
            place: where it belongs.

        Returns:
            (1, L, D) hidden states, float32, float16, or bfloat16's bits as uint16, with their place. From the last stage
            (1, 1, vocab) float32 logits of the last token, with the place of the token that follows.

        Raises:
            ProtocolError: a tensor that does not belong here now.
            OverloadedError: the plan has no room for more tokens.
            StageError, StageOutOfMemoryError: the computation failed.
        """
        model = self._model
        if model is None:
            raise StageError("this node holds no layers")
        self._check_place(place)
        x = taken(model, tensor)
        held = self._sequence(request_id, place, model, length=x.shape[0])
        try:
            out = model.forward_ragged(x, [(x.shape[0], held.caches)])
            held.length += x.shape[0]
            return self._output(model, out, place, held)
        except (RuntimeError, ValueError, MemoryError) as error:  # what MLX raises
            raise as_fault(error, stage=self._pinned.own) from error

    def _check_room(self, manifest: StageManifest) -> None:
        free_bytes = free_memory().free_bytes
        if manifest.resident_bytes > free_bytes:
            raise StageOutOfMemoryError(
                f"layers {manifest.start_layer}:{manifest.end_layer} do not fit into this machine's memory now",
                stage=self._pinned.own,
                expected=f"at most {format_bytes(free_bytes)}",
                found=format_bytes(manifest.resident_bytes),
                where=self._pinned.seat.node_id,
                fix="close other programs; on a Mac raise the limit as the plan says (`sudo sysctl iogpu.wired_limit_mb=N`)",
            )

    def _check_place(self, place: Place) -> None:
        seat = self._pinned.seat
        if place.plan != self._digest:
            raise ProtocolError(
                "two nodes follow different plans",
                expected=f"plan {self._digest} ({seat.node_id})",
                found=f"plan {place.plan}",
                fix="start every node with the same plan file and the same --node and --name",
            )
        if place.layer != seat.start_layer:
            raise ProtocolError(
                "a tensor for other layers: a node of the plan was skipped",
                expected=f"layer {seat.start_layer} next ({seat.node_id})",
                found=f"layer {place.layer} next",
                fix="ask again once every node of the plan is back",
            )

    def _sequence(self, request_id: str, place: Place, model: Model, *, length: int) -> _Held:
        now_s = time.monotonic()
        if place.offset == 0:
            self._held[request_id] = _Held(model.make_cache(), 0, now_s)
        held = self._held.get(request_id)
        if held is None or held.length != place.offset:
            raise ProtocolError(
                "a tensor that does not follow what this node holds of the sequence",
                expected="a sequence that was begun" if held is None else f"offset {held.length}",
                found=f"offset {place.offset}",
                where=self._pinned.seat.node_id,
            )
        held.touched_s = now_s
        for stale in [key for key, each in self._held.items() if now_s - each.touched_s > IDLE_S]:
            del self._held[stale]
        used = sum(each.length for each in self._held.values())
        if used + length > self._pinned.tokens:
            self._held.pop(request_id)
            raise OverloadedError(
                "no room for more tokens",
                expected=f"at most {self._pinned.tokens} of all requests together, by the plan",
                found=f"{used} held, {length} more",
                fix="plan again with more --context or --concurrency, or wait for the other requests",
            )
        return held

    def _output(self, model: Model, out: mx.array, place: Place, held: _Held) -> tuple[Array, Place]:
        if not model.is_last:
            return given(out), replace(place, layer=self._pinned.seat.end_layer)
        mx.eval([cache.state for cache in held.caches])  # no lazy graph outlives a step
        after = replace(place, offset=held.length, layer=0)
        if place.more:
            return np.empty((1, 0, model.args.vocab_size), np.float32), after
        logits = np.array(model.logits(out[-1:]))[None]
        if not np.isfinite(logits).all():
            raise StageError("the model computed logits that are not finite", stage=self._pinned.own)
        return logits, after

    def _progress(self, what: str) -> Callable[[int, int], None]:
        said_s = time.monotonic()

        def progress(done_bytes: int, total_bytes: int) -> None:
            nonlocal said_s
            if time.monotonic() - said_s > SAY_EVERY_S:
                said_s = time.monotonic()
                self._say(f"loading {what}: {format_bytes(done_bytes)} of {format_bytes(total_bytes)}")

        return progress
