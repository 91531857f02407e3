"""This node's layers inside legacy exo: loaded strictly, run, and freed, all in one thread, for MLX's streams belong to threads.

They outlive exo's engine objects: exo makes a new one whenever a node comes or goes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import StageManifest, resolve
from exo_kimi.errors import OverloadedError, ProtocolError, StageError
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.plugin.legacy.place import Place
from exo_kimi.plugin.legacy.plan import PinnedPlan
from exo_kimi.plugin.legacy.tensors import Array, given, taken
from exo_kimi.runtime.stage.resident import ResidentStage, check_room, give_back_memory
from exo_kimi.runtime.stage.sequence_state import SequenceState, SequenceTable
from exo_kimi.runtime.stage.worker import as_fault
from exo_kimi.units import format_bytes

SAY_EVERY_S = 10.0
IDLE_S = 600.0  # a sequence that nobody touched for this long was abandoned: exo does not say when a request ends badly


@dataclass(slots=True, kw_only=True)
class _RequestState(SequenceState):
    """The caches of one of exo's requests; `touched_s` is when a tensor of it came last (monotonic)."""

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
        self._directory, self._pinned, self._say = directory, pinned, say
        self._digest = pinned.digest
        self._resident: ResidentStage | None = None
        self._requests: SequenceTable[str, _RequestState] = SequenceTable()

    @property
    def loaded(self) -> bool:
        """Whether the layers are here."""
        return self._resident is not None

    @property
    def resident_bytes(self) -> int:
        """Memory that the layers take; 0 when they are not here."""
        return 0 if self._resident is None else self._resident.resident_bytes

    @property
    def sequences(self) -> int:
        """How many have caches."""
        return len(self._requests)

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
        if self._resident is not None:
            return False
        seat, manifest = self._pinned.seat, self.manifest()
        what = f"layers {seat.start_layer}:{seat.end_layer} of {self._pinned.name}"
        self._say(f"loading {what}, {format_bytes(manifest.disk_bytes)}")
        check_room(manifest, stage=self._pinned.own, where=seat.node_id)
        resident = ResidentStage.load(manifest, stage=self._pinned.own, progress=self._progress(what))
        self._resident = resident
        self._say(
            f"holds {what}: {resident.resident_bytes} bytes resident ({format_bytes(resident.resident_bytes)}), "
            f"{resident.load_s:.1f} s"
        )
        return True

    def unload(self) -> None:
        """Give all memory back. In the thread."""
        if self._resident is not None:
            self._say(f"frees {self._pinned.name} ({format_bytes(self.resident_bytes)})")
        self._resident = None
        self._requests.clear()
        give_back_memory()

    def release(self, request_id: str) -> None:
        """Drop a sequence that ended. In the thread."""
        self._requests.drop([request_id])

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
            StageError: the computation failed.
        """
        if self._resident is None:
            raise StageError("this node holds no layers")
        model = self._resident.model
        self._check_place(place)
        x = taken(model, tensor)
        request = self._request(request_id, place, model, length=x.shape[0])
        try:
            out = model.forward_ragged(x, [(x.shape[0], request.caches)])
            request.length += x.shape[0]
            return self._output(model, out, place, request)
        except (RuntimeError, ValueError, MemoryError) as error:  # what MLX raises
            raise as_fault(error, stage=self._pinned.own) from error

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

    def _request(self, request_id: str, place: Place, model: Model, *, length: int) -> _RequestState:
        now_s = time.monotonic()
        if place.offset == 0:
            self._requests[request_id] = _RequestState(caches=model.make_cache(), touched_s=now_s)
        request = self._requests.get(request_id)
        if request is None or request.length != place.offset:
            raise ProtocolError(
                "a tensor that does not follow what this node holds of the sequence",
                expected="a sequence that was begun" if request is None else f"offset {request.length}",
                found=f"offset {place.offset}",
                where=self._pinned.seat.node_id,
            )
        request.touched_s = now_s
        for stale in [key for key, each in self._requests.items() if now_s - each.touched_s > IDLE_S]:
            del self._requests[stale]
        used = sum(each.length for each in self._requests.values())
        if used + length > self._pinned.tokens:
            self._requests.pop(request_id)
            raise OverloadedError(
                "no room for more tokens",
                expected=f"at most {self._pinned.tokens} of all requests together, by the plan",
                found=f"{used} held, {length} more",
                fix="plan again with more --context or --concurrency, or wait for the other requests",
            )
        return request

    def _output(self, model: Model, out: mx.array, place: Place, request: _RequestState) -> tuple[Array, Place]:
        if not model.is_last:
            return given(out), replace(place, layer=self._pinned.seat.end_layer)
        mx.eval([cache.state for cache in request.caches])  # no lazy graph outlives a step
        after = replace(place, offset=request.length, layer=0)
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
