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
from exo_kimi.plugin.legacy.plan import PinnedPlan
from exo_kimi.plugin.legacy.tensors import Array, TensorPosition, given, taken
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
        own = self._pinned.own
        return resolve(open_index(self._directory), own.start_layer, own.end_layer)

    def load(self) -> bool:
        """Hold the layers; False when they were here already. In the thread.

        Raises:
            CheckpointError: they cannot be read.
            RuntimeFault: they do not fit, or MLX could not hold them.
        """
        if self._resident is not None:
            return False
        own, manifest = self._pinned.own, self.manifest()
        what = f"layers {own.start_layer}:{own.end_layer} of {self._pinned.name}"
        self._say(f"loading {what}, {format_bytes(manifest.disk_bytes)}")
        check_room(manifest, stage=self._pinned.stage, where=own.node_id)
        resident = ResidentStage.load(manifest, stage=self._pinned.stage, progress=self._progress(what))
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

    def run(self, request_id: str, tensor: Array, position: TensorPosition) -> tuple[Array, TensorPosition]:
        """Tokens or hidden states through these layers. In the thread.

        Args:
            request_id: exo's.
            tensor: (1, L) token ids for the first stage, else (1, L, D) as `run` gave it on the stage before.
            position: where it belongs.

        Returns:
            (1, L, D) hidden states, float32, float16, or bfloat16's bits as uint16, with their position. From the last stage
            (1, 1, vocab) float32 logits of the last token, with the position of the token that follows.

        Raises:
            ProtocolError: a tensor that does not belong here now.
            OverloadedError: the plan has no room for more tokens.
            StageError: the computation failed.
        """
        if self._resident is None:
            raise StageError("this node holds no layers")
        model = self._resident.model
        self._check_position(position)
        x = taken(model, tensor)
        request = self._request(request_id, position, model, length=x.shape[0])
        try:
            out = model.forward_ragged(x, [(x.shape[0], request.caches)])
            request.length += x.shape[0]
            return self._output(model, out, position, request)
        except (RuntimeError, ValueError, MemoryError) as error:  # what MLX raises
            raise as_fault(error, stage=self._pinned.stage) from error

    def _check_position(self, position: TensorPosition) -> None:
        own = self._pinned.own
        if position.plan != self._digest:
            raise ProtocolError(
                "two nodes follow different plans",
                expected=f"plan {self._digest} ({own.node_id})",
                found=f"plan {position.plan}",
                fix="start every node with the same plan file and the same --node and --name",
            )
        if position.layer != own.start_layer:
            raise ProtocolError(
                "a tensor for other layers: a node of the plan was skipped",
                expected=f"layer {own.start_layer} next ({own.node_id})",
                found=f"layer {position.layer} next",
                fix="ask again once every node of the plan is back",
            )

    def _request(self, request_id: str, position: TensorPosition, model: Model, *, length: int) -> _RequestState:
        now_s = time.monotonic()
        if position.offset == 0:
            self._requests[request_id] = _RequestState(caches=model.make_cache(), touched_s=now_s)
        request = self._requests.get(request_id)
        if request is None or request.length != position.offset:
            raise ProtocolError(
                "a tensor that does not follow what this node holds of the sequence",
                expected="a sequence that was begun" if request is None else f"offset {request.length}",
                found=f"offset {position.offset}",
                where=self._pinned.own.node_id,
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

    def _output(
        self, model: Model, out: mx.array, position: TensorPosition, request: _RequestState
    ) -> tuple[Array, TensorPosition]:
        if not model.is_last:
            return given(out), replace(position, layer=self._pinned.own.end_layer)
        mx.eval([cache.state for cache in request.caches])  # no lazy graph outlives a step
        after = replace(position, offset=request.length, layer=0)
        if position.more:
            return np.empty((1, 0, model.args.vocab_size), np.float32), after
        logits = np.array(model.logits(out[-1:]))[None]
        if not np.isfinite(logits).all():
            raise StageError("the model computed logits that are not finite", stage=self._pinned.stage)
        return logits, after

    def _progress(self, what: str) -> Callable[[int, int], None]:
        said_s = time.monotonic()

        def progress(done_bytes: int, total_bytes: int) -> None:
            nonlocal said_s
            if time.monotonic() - said_s > SAY_EVERY_S:
                said_s = time.monotonic()
                self._say(f"loading {what}: {format_bytes(done_bytes)} of {format_bytes(total_bytes)}")

        return progress
