"""exo's Builder on our runtime: checks this rank's share, loads it strictly with progress, and makes the engine.

It fits exo's abstract class by its methods (`exo_launch` registers it there); exo is asked for one thing, where a model's
files are.
"""

from __future__ import annotations

import importlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import StageManifest, resolve
from exo_kimi.errors import ExoLoadError
from exo_kimi.plugin.runner.assignment import Part, key_of, part_of
from exo_kimi.plugin.runner.chunks import ExoTypes
from exo_kimi.plugin.runner.engine import CancelReceiver, Follower, KimiEngine, Leading
from exo_kimi.plugin.runner.leader import READY_S, Leader, cluster_plan, config_hash
from exo_kimi.plugin.runner.options import EngineOptions
from exo_kimi.plugin.runner.rank_messages import LedgerReader
from exo_kimi.plugin.runner.stage import StageHost
from exo_kimi.plugin.runner.task import Speaker
from exo_kimi.runtime.transport.address import Address
from exo_kimi.runtime.transport.keys import ENVIRONMENT_NAME, ClusterKey

logger = logging.getLogger(__name__)


class KimiBuilder:
    """exo's Builder for one runner.

    Args:
        model_id: exo's.
        event_sender: exo's; unused, for exo's runner sends what `Engine.step` yields.
        cancel_receiver: exo's.
        types: exo's; None takes those of the exo around us.
        find_directory: gives a model's directory once its files are there; None asks exo.
    """

    def __init__(
        self,
        model_id: Any,
        event_sender: Any,
        cancel_receiver: CancelReceiver,
        *,
        types: ExoTypes | None = None,
        find_directory: Callable[[Any], Path | None] | None = None,
    ) -> None:
        self._model_id = model_id
        self._cancel_receiver = cancel_receiver
        self._types = types or ExoTypes.installed()
        self._find_directory = find_directory or model_directory
        self._part: Part | None = None
        self._key: ClusterKey | None = None
        self._host: StageHost | None = None
        self._leader: Leader | None = None
        self._reader: LedgerReader | None = None
        self._manifest: StageManifest | None = None
        self._socket: tempfile.TemporaryDirectory[str] | None = None

    def connect(self, bound_instance: Any) -> None:
        """Check this rank's share and listen for the others; no weight is read.

        Raises:
            CheckpointError: this node's files are there and are not these layers.
            ExoPlacementError, AddressError: the instance or its addresses cannot be used.
            StageUnreachableError, StageStalledError: a rank did not come in time.
        """
        part = self._part = part_of(bound_instance)
        if (directory := self._find_directory(self._model_id)) is not None:
            self._manifest = _resolve(directory, part)
        key = self._key = key_of(part, environment_text=os.environ.get(ENVIRONMENT_NAME))
        listen = part.listen
        if part.stage == 0:
            self._leader = Leader(part, key=key, types=self._types, options=EngineOptions.from_environment())
            self._socket = tempfile.TemporaryDirectory(prefix="exo-kimi-")
            listen = Address("", 0, f"{self._socket.name}/0")
        assert listen is not None
        self._host = StageHost(listen, key=key)
        logger.info("rank %d of %d: layers %d:%d", part.stage, part.stages, part.start_layer, part.end_layer)
        # exo has the last rank connect when it sees all others connecting: none may be done before.
        if self._leader is not None:
            self._leader.wait_connected()
        elif part.leader is not None:
            self._reader = LedgerReader(part.leader, part.stage, key=key, connect_s=READY_S)
            self._reader.wait_connected(READY_S)

    def load(self, bound_instance: Any) -> Iterator[Any]:
        """Load this rank's layers, with progress.

        Raises:
            CheckpointError: see `connect`.
            StageOutOfMemoryError: they do not fit.
        """
        if self._host is None:
            self.connect(bound_instance)  # an instance of one node has no group to connect
        assert self._part is not None and self._host is not None
        if self._manifest is None:
            directory = self._find_directory(self._model_id)
            if directory is None:
                raise ExoLoadError("exo did not find the model's files", found="none", where=self._model_id)
            self._manifest = _resolve(directory, self._part)
        layers = self._part.end_layer - self._part.start_layer
        config = config_hash(self._manifest.config)
        told = -1
        for fraction in self._host.load(self._manifest, stage=self._part.stage, config_hash=config):
            loaded = min(int(fraction * layers), layers)
            if loaded != told:
                told = loaded
                yield self._types.ModelLoadingResponse(layers_loaded=loaded, total=layers)
        yield self._types.ModelLoadingResponse(layers_loaded=layers, total=layers)

    def build(self) -> KimiEngine:
        """The engine of this rank."""
        assert self._part is not None and self._host is not None and self._manifest is not None
        assert self._key is not None
        part, key, host, manifest = self._part, self._key, self._host, self._manifest
        if self._leader is None:
            assert self._reader is not None
            return Follower(self._reader, host, types=self._types, cancelled=self._cancel_receiver)
        leader = self._leader
        speaker = Speaker.from_directory(manifest.directory)
        plan = cluster_plan(part, manifest.directory, manifest.config, host.address, key)

        def warm_up() -> None:
            leader.start(speaker, plan)

        return Leading(leader, host, warm_up, types=self._types, cancelled=self._cancel_receiver)

    def close(self) -> None:
        """Give everything back; exo calls it when a runner is shut down before `build`."""
        if self._leader is not None:
            self._leader.close()
        if self._reader is not None:
            self._reader.close()
        if self._host is not None:
            self._host.stop()
        if self._socket is not None:
            self._socket.cleanup()


def model_directory(model_id: Any) -> Path | None:
    """Where exo has a model's files, once they are complete."""
    found = importlib.import_module("exo.download.download_utils").resolve_existing_model(model_id)
    return None if found is None else Path(found)


def _resolve(directory: Path, part: Part) -> StageManifest:
    manifest = resolve(open_index(directory), part.start_layer, part.end_layer)
    for note in manifest.notes:
        logger.info("%s: %s", directory, note)
    return manifest
