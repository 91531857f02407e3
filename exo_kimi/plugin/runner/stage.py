"""This runner's stage: a thread that does its MLX work, another with its sockets, inside exo's runner process.

exo decides when layers are loaded and each node which files it has, so the stage loads on its own; a leader that asks it to
finds them there.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from exo_kimi.checkpoint.drafts.manifest import DraftManifest
from exo_kimi.checkpoint.manifest import StageManifest
from exo_kimi.checkpoint.vision import VisionManifest
from exo_kimi.errors import AddressError, CheckpointError, ExoKimiError, StageError
from exo_kimi.plugin.runner.options import DRAFT, expert_cache_of
from exo_kimi.runtime.protocol.messages import Load
from exo_kimi.runtime.protocol.versions import Versions
from exo_kimi.runtime.stage.backend import MlxBackend
from exo_kimi.runtime.stage.compute_thread import Order, StageCompute, StageStatus
from exo_kimi.runtime.stage.memory import free_memory
from exo_kimi.runtime.stage.process import SWITCH_INTERVAL_S
from exo_kimi.runtime.stage.resident import ResidentStage
from exo_kimi.runtime.stage.server import StageServer
from exo_kimi.runtime.transport.address import Address
from exo_kimi.runtime.transport.keys import ClusterKey

logger = logging.getLogger(__name__)
BIND_S = 10.0  # the runner before this one may be about to end
_POLL_S = 0.1


class PreloadedLayers:
    """Layers that were loaded before a leader came: every leader that expects them gets them, until they are dropped.

    A leader's Load names the config only, for its node may lack the files.

    Args:
        resident: the layers.
        config_hash: of the model's config, see `leader.config_hash`.
    """

    def __init__(self, resident: ResidentStage, config_hash: str) -> None:
        self._resident: ResidentStage | None = resident
        self._config_hash = config_hash

    def take(self, order: Load, progress: Callable[[int, int], None]) -> ResidentStage:
        """The layers, if they are what the leader expects.

        Raises:
            CheckpointError: other layers, or another model.
            StageError: they were dropped.
        """
        if self._resident is None:
            raise StageError("this runner's layers are gone: exo must start it anew", stage=order.stage)
        held = self._resident.manifest
        if (held.start_layer, held.end_layer) != (order.start_layer, order.end_layer):
            raise CheckpointError(
                "this runner holds other layers",
                expected=f"{order.start_layer}:{order.end_layer}",
                found=f"{held.start_layer}:{held.end_layer}",
                where=held.directory,
            )
        if order.fingerprint != self._config_hash:
            raise CheckpointError(
                "two nodes have different models under one name",
                expected=f"config {order.fingerprint[:16]} (rank 0)",
                found=f"config {self._config_hash[:16]}",
                where=held.directory,
                fix="copy the model's files anew with `exo-kimi exo prepare`",
            )
        if order.draft_fingerprint is not None and order.draft_fingerprint != self._resident.draft_fingerprint:
            found = self._resident.draft_fingerprint
            raise CheckpointError(
                "the last rank does not hold rank 0's draft head",
                expected=f"fingerprint {order.draft_fingerprint[:16]} (rank 0)",
                found="none" if found is None else f"fingerprint {found[:16]}",
                where=DRAFT,
                fix=f"copy the head there, and start exo with {DRAFT}=HEAD_DIR on that node too",
            )
        return self._resident

    def drop(self) -> None:
        """Let go of the layers for good."""
        self._resident = None


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a host is to load."""

    manifest: StageManifest
    stage: int
    config_hash: str
    tower: VisionManifest | None
    draft: DraftManifest | None
    expert_trace: Path | None


class StageHost:
    """Threads of one stage; both end with `stop`, or with the process.

    Args:
        listen: where leaders and the stage before connect.
        key: for every connection, loopback too.
        rdma_device: of this node, to its neighbour; None without RDMA.
    """

    def __init__(self, listen: Address, *, key: ClusterKey, rdma_device: str | None = None) -> None:
        self._orders: SimpleQueue[Order] = SimpleQueue()
        self._to_load: SimpleQueue[_Wanted | None] = SimpleQueue()
        self._loaded: Future[None] = Future()
        self._status: Future[StageStatus] = Future()
        self._server: Future[StageServer] = Future()
        threading.Thread(target=self._work, name="exo-kimi-stage", daemon=True).start()
        self.status = self._status.result()
        server, self.address = self._listen(listen, key, rdma_device)
        self._server.set_result(server)
        sys.setswitchinterval(SWITCH_INTERVAL_S)

    def load(
        self,
        manifest: StageManifest,
        *,
        stage: int,
        config_hash: str,
        tower: VisionManifest | None = None,
        draft: DraftManifest | None = None,
        expert_trace: Path | None = None,
    ) -> Iterator[float]:
        """Load this stage's layers, and with them the tower for pictures or the draft head; yields the fraction done.

        Raises:
            CheckpointError, RuntimeFault: it cannot be done.
        """
        self._to_load.put(_Wanted(manifest, stage, config_hash, tower, draft, expert_trace))
        while not self._loaded.done():
            time.sleep(_POLL_S)
            if self.status.total_bytes:
                yield self.status.loaded_bytes / self.status.total_bytes
        self._loaded.result()

    def stop(self) -> None:
        """Free the weights and end both threads, without waiting for a step in progress."""
        self._to_load.put(None)
        self._orders.put(None)
        if self._server.done():
            self._server.result().stop()

    def _listen(self, listen: Address, key: ClusterKey, rdma_device: str | None) -> tuple[StageServer, Address]:
        until_s = time.monotonic() + BIND_S
        while True:
            server = StageServer(
                listen,
                key=key,
                next_key=key,
                orders=self._orders,
                status=self.status,
                versions=Versions.installed(),
                leader_may_vanish=True,
                rdma_device=rdma_device,
            )
            threading.Thread(target=server.run, name="exo-kimi-stage-io", daemon=True).start()
            try:
                return server, server.bound.result()
            except AddressError:
                if time.monotonic() > until_s:
                    raise
                time.sleep(0.5)

    def _work(self) -> None:
        """Load, then carry out orders; the body of the stage's thread, for MLX's streams belong to threads."""
        status = StageStatus(free=free_memory())
        self._status.set_result(status)
        wanted = self._to_load.get()
        if wanted is None:
            return
        try:
            status.state = "loading"
            resident = ResidentStage.load(
                wanted.manifest,
                stage=wanted.stage,
                progress=self._progress,
                fuse=True,
                vision=wanted.tower,
                expert_cache=expert_cache_of(),
                draft=wanted.draft,
            )
            backend = MlxBackend(PreloadedLayers(resident, wanted.config_hash), expert_trace=wanted.expert_trace)
            del resident  # from here on the backend's to drop
            status.active_bytes, status.peak_bytes = backend.memory()
            status.free = backend.free()
        except ExoKimiError as error:
            self._loaded.set_exception(error)
            return
        except Exception as error:
            logger.exception("loading failed")
            self._loaded.set_exception(error)
            return
        finally:
            status.busy_since_s = None
        self._loaded.set_result(None)
        StageCompute(backend, status, self._server.result().post).run(self._orders)
        backend.unload()

    def _progress(self, done_bytes: int, total_bytes: int) -> None:
        self.status.loaded_bytes, self.status.total_bytes = done_bytes, total_bytes
        self.status.busy_since_s = time.monotonic()
