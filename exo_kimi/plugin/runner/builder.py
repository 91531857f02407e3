"""exo's Builder on our runtime: checks this rank's share, loads it strictly with progress, and makes the engine.

It fits exo's abstract class by its methods (`launch` registers it there); exo is asked for one thing, where a model's
files are.
"""

from __future__ import annotations

import importlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exo_kimi.checkpoint.drafts.manifest import DraftManifest, resolve_draft
from exo_kimi.checkpoint.fingerprint import tower_fingerprint
from exo_kimi.checkpoint.index import CheckpointIndex, open_index
from exo_kimi.checkpoint.manifest import StageManifest, resolve
from exo_kimi.checkpoint.vision import NoVision, VisionManifest, find_vision
from exo_kimi.dialogue.pictures import PicturePrompts
from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.errors import ExoLoadError
from exo_kimi.pictures.picture import PixelRules
from exo_kimi.pictures.reader import PictureReader
from exo_kimi.plugin.api.engine_route import API_PORT
from exo_kimi.plugin.runner.advice import advising
from exo_kimi.plugin.runner.assignment import NodeLayers, check_placement, key_of, node_layers_of, with_address
from exo_kimi.plugin.runner.chunks import ExoTypes
from exo_kimi.plugin.runner.engine import CancelReceiver, Follower, KimiEngine, Leading
from exo_kimi.plugin.runner.events import RunnerEvents
from exo_kimi.plugin.runner.leader import READY_S, Leader, cluster_plan, config_hash
from exo_kimi.plugin.runner.neighbours import check_neighbours
from exo_kimi.plugin.runner.options import EngineOptions, draft_of, expert_trace_of
from exo_kimi.plugin.runner.rank_messages import RankMessagesReader
from exo_kimi.plugin.runner.stage import StageHost
from exo_kimi.runtime.engine.speculation import Drafter
from exo_kimi.runtime.pairs.pairing_handshake import own_address_towards
from exo_kimi.runtime.transport.address import Address
from exo_kimi.runtime.transport.keys import ENVIRONMENT_NAME, ClusterKey

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Connected:
    """What a rank has once exo has connected it: on rank 0 `others` leads them, elsewhere it hears rank 0."""

    own: NodeLayers
    key: ClusterKey
    host: StageHost
    others: Leader | RankMessagesReader


class KimiBuilder:
    """exo's Builder for one runner.

    Args:
        model_id: exo's.
        event_sender: exo's, as `launch.entrypoint` wraps it.
        cancel_receiver: exo's.
        types: exo's; None takes those of the exo around us.
        find_directory: gives a model's directory once its files are there; None asks exo.
    """

    def __init__(
        self,
        model_id: Any,
        event_sender: RunnerEvents,
        cancel_receiver: CancelReceiver,
        *,
        types: ExoTypes | None = None,
        find_directory: Callable[[Any], Path | None] | None = None,
    ) -> None:
        self._model_id = model_id
        self._events = event_sender
        self._cancel_receiver = cancel_receiver
        self._types = types or ExoTypes.installed()
        self._find_directory = find_directory or model_directory
        self._connected: _Connected | None = None
        self._vision_repository: str | None = None
        self._manifest: StageManifest | None = None
        self._tower: VisionManifest | NoVision = NoVision("the model's files are not there")
        self._draft: DraftManifest | None = None
        self._exits = ExitStack()

    def connect(self, bound_instance: Any) -> None:
        """Check this rank's share and listen for the others; no weight is read.

        Raises:
            CheckpointError: this node's files are there and are not these layers.
            ExoPlacementError, AddressError: the instance or its addresses cannot be used, or a node does not run our engine.
            StageUnreachableError, StageStalledError: a rank did not come in time.
        """
        with advising():
            self._connect(bound_instance)

    def load(self, bound_instance: Any) -> Iterator[Any]:
        """Load this rank's layers, with progress.

        Raises:
            CheckpointError: see `connect`.
            StageOutOfMemoryError: they do not fit.
        """
        with advising():
            yield from self._load(bound_instance)

    def _load(self, bound_instance: Any) -> Iterator[Any]:
        connected = self._connected or self._connect(bound_instance)  # an instance of one node has no group to connect
        own = connected.own
        manifest = self._manifest = self._manifest or self._resolve(own)
        if manifest is None:
            raise ExoLoadError("exo did not find the model's files", found="none", where=self._model_id)
        layers = own.end_layer - own.start_layer
        told = -1
        tower = self._tower if own.stage == 0 and isinstance(self._tower, VisionManifest) else None
        draft = self._draft = self._find_draft(own, manifest)
        loading = connected.host.load(
            manifest,
            stage=own.stage,
            config_hash=config_hash(manifest.config),
            tower=tower,
            draft=draft if own.stage == own.stages - 1 else None,
            expert_trace=expert_trace_of(own.stage, own.stages),
        )
        for fraction in loading:
            loaded = min(int(fraction * layers), layers)
            if loaded != told:
                told = loaded
                yield self._types.ModelLoadingResponse(layers_loaded=loaded, total=layers)
        yield self._types.ModelLoadingResponse(layers_loaded=layers, total=layers)

    def build(self) -> KimiEngine:
        """The engine of this rank.

        Raises:
            ExoLoadError: exo did not load before.
        """
        connected, manifest = self._connected, self._manifest
        if connected is None or manifest is None:
            raise ExoLoadError("an engine is built of what was loaded", found="nothing", where=self._model_id)
        host, others = connected.host, connected.others
        if isinstance(others, RankMessagesReader):
            return Follower(others, host, types=self._types, events=self._events, cancelled=self._cancel_receiver)
        speaker = replace(Speaker.from_directory(manifest.directory), pictures=self._pictures(manifest.directory))
        head = self._draft
        plan = cluster_plan(connected.own, manifest, host.address, connected.key, draft=head)
        tokens = EngineOptions.from_environment().draft_tokens
        drafter = None if head is None else Drafter.of_stage(manifest, head, tokens)
        return Leading(
            others,
            host,
            lambda: others.start(speaker, plan, drafter=drafter),
            types=self._types,
            cancelled=self._cancel_receiver,
        )

    def close(self) -> None:
        """Give everything back; exo calls it when a runner is shut down before `build`."""
        self._exits.close()

    def _connect(self, bound_instance: Any) -> _Connected:
        check_placement(bound_instance)
        own = node_layers_of(bound_instance)
        self._vision_repository = vision_repository_of(bound_instance)
        self._manifest = self._resolve(own)
        check_neighbours(own, api_port=os.environ.get(API_PORT))
        key = key_of(own, environment_text=os.environ.get(ENVIRONMENT_NAME))
        context = f", a context of {own.context} tokens" if own.context else ""
        logger.info("rank %d of %d: layers %d:%d%s", own.stage, own.stages, own.start_layer, own.end_layer, context)
        # exo has the last rank connect when it sees all others connecting: none may be done before.
        if own.leader is not None and own.listen is not None:
            host = self._open_host(own.listen, key, own.rdma_device)
            told = None
            if own.rdma_device is not None:
                told = Address(own_address_towards(own.leader.host), host.address.port)
            reader = RankMessagesReader(own.leader, own.stage, key=key, connect_s=READY_S, stage=told)
            self._exits.callback(reader.close)
            reader.wait_connected(READY_S)
            self._connected = _Connected(own, key, host, reader)
        else:
            # Its own stage listens where this process alone can reach it: the instance's address is the leader's.
            folder = self._exits.enter_context(tempfile.TemporaryDirectory(prefix="exo-kimi-"))
            host = self._open_host(Address("", 0, f"{folder}/0"), key, own.rdma_device)
            options = EngineOptions.from_environment()
            leader = Leader(own, key=key, types=self._types, events=self._events, options=options)
            self._exits.callback(leader.close)
            leader.wait_connected()
            if own.rdma_device is not None:
                own = with_address(own, leader.address_of(1))
            self._connected = _Connected(own, key, host, leader)
        return self._connected

    def _open_host(self, listen: Address, key: ClusterKey, rdma_device: str | None) -> StageHost:
        host = StageHost(listen, key=key, rdma_device=rdma_device)
        self._exits.callback(host.stop)
        return host

    def _resolve(self, own: NodeLayers) -> StageManifest | None:
        """This rank's layers, from the headers; None while exo does not have the model's files."""
        directory = self._find_directory(self._model_id)
        if directory is None:
            return None
        index = open_index(directory)
        manifest = resolve(index, own.start_layer, own.end_layer)
        if own.stage == 0:
            self._tower = self._find_tower(index)
        for note in manifest.notes:
            logger.info("%s: %s", directory, note)
        return manifest

    def _find_draft(self, own: NodeLayers, manifest: StageManifest) -> DraftManifest | None:
        """The draft head, on the first rank, which asks it, and on the last, which holds it.

        Raises:
            CheckpointError: what EXO_KIMI_DRAFT names is no head of this model.
        """
        directory = draft_of()
        off = EngineOptions.from_environment().draft_tokens == 0
        if directory is None or off or own.stage not in (0, own.stages - 1):
            return None
        head = resolve_draft(directory)
        head.config.check_target(manifest.config, where=directory)
        logger.info("draft head %s, of layers %s", directory, head.config.feature_layers(own.ranges[-1][1]))
        return head

    def _find_tower(self, index: CheckpointIndex) -> VisionManifest | NoVision:
        """The tower beside the layers, else the one of the repository that exo's model card names."""
        tower = find_vision(index)
        if isinstance(tower, NoVision) and self._vision_repository not in (None, str(self._model_id)):
            apart = self._find_directory(type(self._model_id)(self._vision_repository))
            if apart is not None:
                tower = find_vision(index, apart)
        if isinstance(tower, NoVision):
            logger.info("text only: %s", tower.reason)
        return tower

    def _pictures(self, directory: Path) -> PicturePrompts | NoVision:
        if isinstance(self._tower, NoVision):
            return self._tower
        # exo has fetched what is on the web before a task comes here.
        rules = PixelRules.from_directory(self._tower.config, directory, tower=tower_fingerprint(self._tower))
        return PicturePrompts(self._tower.config, PictureReader(rules))


def vision_repository_of(bound_instance: Any) -> str | None:
    """The repository with the vision tower, as the instance's model card names it; v1.0.71's cards name none."""
    vision = getattr(bound_instance.bound_shard.model_card, "vision", None)
    repository = getattr(vision, "weights_repo", None)
    return str(repository) if repository else None


def model_directory(model_id: Any) -> Path | None:
    """Where exo has a model's files, once they are complete."""
    found = importlib.import_module("exo.download.download_utils").resolve_existing_model(model_id)
    return None if found is None else Path(found)
