"""A stage's layers in memory: counted, refused where they do not fit, and given back; from a checkpoint or loaded before."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from exo_kimi.checkpoint.fingerprint import stage_fingerprint
from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import StageManifest, resolve
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import CheckpointError, StageError, StageOutOfMemoryError
from exo_kimi.plugin.runner.stage import PreloadedLayers
from exo_kimi.runtime.protocol.messages import Load
from exo_kimi.runtime.stage import resident
from exo_kimi.runtime.stage.backend import CheckpointLayers, LayerSource, MlxBackend
from exo_kimi.runtime.stage.memory import FreeMemory
from exo_kimi.runtime.stage.resident import ResidentStage, check_room, give_back_memory


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> StageManifest:
    return resolve(open_index(make_tiny(tmp_path_factory.mktemp("resident") / "tiny", dtype="F32")), 1, 4)


def order_for(manifest: StageManifest, fingerprint: str, *, end_layer: int = 4) -> Load:
    directory = str(manifest.directory)
    return Load(stage=1, directory=directory, start_layer=1, end_layer=end_layer, dtype=None, fingerprint=fingerprint)


def progress(done_bytes: int, total_bytes: int) -> None:
    """Nobody looks."""


def test_what_is_let_go_is_given_back(manifest: StageManifest) -> None:
    give_back_memory()
    before_bytes = mx.get_active_memory()
    stage = ResidentStage.load(manifest, stage=1)
    assert stage.dtype == mx.float32
    assert 0.99 * manifest.resident_bytes <= stage.resident_bytes <= 1.05 * manifest.resident_bytes
    del stage
    give_back_memory()
    assert mx.get_active_memory() <= before_bytes


def test_an_mlx_that_cannot_allocate_is_our_error(manifest: StageManifest, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("[malloc] Unable to allocate 7 bytes.")

    monkeypatch.setattr(resident, "load_stage", refuse)
    with pytest.raises(StageOutOfMemoryError, match="stage 1 ran out of memory"):
        ResidentStage.load(manifest, stage=1)


def test_layers_larger_than_the_free_memory_are_refused(
    manifest: StageManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_room(manifest, stage=1, where="here")
    monkeypatch.setattr(resident, "free_memory", lambda: FreeMemory(free_bytes=1000, scope="host"))
    with pytest.raises(StageOutOfMemoryError, match=r"layers 1:4 do not fit"):
        check_room(manifest, stage=1, where="here")


def test_a_backend_gives_back_what_it_took_from_a_checkpoint(manifest: StageManifest) -> None:
    _gives_back(CheckpointLayers(None), order_for(manifest, stage_fingerprint(manifest)))


def test_a_backend_gives_back_what_was_loaded_before_and_then_has_none(manifest: StageManifest) -> None:
    order = order_for(manifest, "config")
    layers = PreloadedLayers(ResidentStage.load(manifest, stage=1, fuse=True), "config")
    backend = _gives_back(layers, order)
    with pytest.raises(StageError, match="layers are gone"):
        backend.load(order, progress)


def _gives_back(layers: LayerSource, order: Load) -> MlxBackend:
    backend = MlxBackend(layers)
    answer = backend.load(order, progress)
    assert (answer.start_layer, answer.end_layer) == (1, 4)
    assert backend.load(order, progress) is answer
    held_bytes, _ = backend.memory()
    backend.unload()
    assert backend.memory()[0] <= held_bytes - 0.9 * answer.weights_bytes
    with pytest.raises(StageError, match="holds no layers"):
        backend.reset(1)
    return backend


def test_layers_loaded_before_outlive_an_order_that_they_do_not_fit(manifest: StageManifest) -> None:
    layers = PreloadedLayers(ResidentStage.load(manifest, stage=1), "config")
    backend = MlxBackend(layers)
    with pytest.raises(CheckpointError, match="different models under one name"):
        backend.load(order_for(manifest, "another"), progress)
    with pytest.raises(CheckpointError, match="holds other layers"):
        backend.load(order_for(manifest, "config", end_layer=5), progress)
    assert backend.load(order_for(manifest, "config"), progress).end_layer == 4


def test_a_checkpoint_that_is_not_the_leaders_is_refused(manifest: StageManifest, tmp_path: Path) -> None:
    backend = MlxBackend(CheckpointLayers(make_tiny(tmp_path / "other", dtype="F32", seed=9)))
    with pytest.raises(CheckpointError, match="not those of the leader's checkpoint"):
        backend.load(order_for(manifest, stage_fingerprint(manifest)), progress)
