"""The tensors of the vision tower: all of them, or one message that says which are wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exo_kimi.arch.vision import Grid, VisionConfig
from exo_kimi.checkpoint.doctor.doctor import doctor
from exo_kimi.checkpoint.doctor.report import inspect
from exo_kimi.checkpoint.fingerprint import tower_fingerprint
from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.packing import store
from exo_kimi.checkpoint.safetensors_io import StoredTensor, write_file
from exo_kimi.checkpoint.tiny.config import VISION_CONFIG
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.checkpoint.vision import NoVision, VisionManifest, find_vision
from exo_kimi.errors import CheckpointError, CheckpointProblems, ConfigError, NotACheckpointError

SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
PUBLISHED = {
    **VISION_CONFIG,
    "init_pos_emb_height": 64,
    "init_pos_emb_width": 64,
    "mm_hidden_size": 1152,
    "text_hidden_size": 7168,
    "vt_hidden_size": 1152,
    "vt_intermediate_size": 4304,
    "vt_num_attention_heads": 16,
    "vt_num_hidden_layers": 27,
}
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def build(name: str = "tiny", **options: Any) -> Path:
        return make_tiny(tmp_path / name, config=SMALL, **{"vision": True, "layout": "bf16", "shards": 1, **options})

    return build


def edit(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def test_the_published_tower_has_its_tensors_and_bytes() -> None:
    config = VisionConfig.from_dict(
        {"vision_config": PUBLISHED, "media_placeholder_token_id": 163605}, hidden_size=7168
    )
    assert config is not None
    names = list(config.shapes)
    assert sum(name.startswith("vision_tower.") for name in names) == 329
    assert sum(name.startswith("mm_projector.") for name in names) == 6
    assert config.parameters * 2 == pytest.approx(0.942e9, rel=1e-3)
    assert config.tokens(Grid(1, 78, 138)) == 2691


def test_a_picture_of_4k_fits_where_its_scores_alone_would_not() -> None:
    config = VisionConfig.from_dict(
        {"vision_config": PUBLISHED, "media_placeholder_token_id": 163605}, hidden_size=7168
    )
    assert config is not None
    grid = Grid(1, 98, 172)
    assert config.scratch_bytes(grid.patches) < 256 * 2**20
    assert 16 * grid.patches**2 * 2 > 8 * 2**30


def test_a_whole_tower_is_found_and_counted(make: Make) -> None:
    found = find_vision(open_index(make()))
    assert isinstance(found, VisionManifest)
    assert found.entries.keys() == found.config.shapes.keys()
    assert found.resident_bytes == 2 * found.config.parameters


def test_a_model_without_pictures_says_so(make: Make) -> None:
    found = find_vision(open_index(make(vision=False)))
    assert found == NoVision("config.json describes no vision tower")


def test_a_conversion_without_its_tower_says_so_and_takes_one_from_elsewhere(make: Make) -> None:
    whole, text = make("whole"), make("text", vision=False, prefix=True)
    found = find_vision(open_index(text))
    assert isinstance(found, NoVision)
    assert "--vision DIR" in found.reason
    apart = find_vision(open_index(text), whole)
    assert isinstance(apart, VisionManifest)
    assert apart.directory == whole


@pytest.mark.parametrize("broken", ["missing", "more", "shape", "dtype"])
def test_a_tower_that_is_not_whole_is_refused_by_name(make: Make, tmp_path: Path, broken: str) -> None:
    text = make("text", vision=False, prefix=True)
    config = find_vision(open_index(make("whole"))).config  # type: ignore[union-attr]
    tensors = {name: store(np.zeros(shape, np.float32), "F32") for name, shape in config.shapes.items()}
    name = "vision_tower.encoder.blocks.1.mlp.fc0.weight"
    if broken == "missing":
        del tensors[name]
    elif broken == "more":
        name = "vision_tower.encoder.blocks.2.wo.weight"
        tensors[name] = store(np.zeros((32, 32), np.float32), "F32")
    elif broken == "shape":
        tensors[name] = store(np.zeros((32, 48), np.float32), "F32")
    else:
        tensors[name] = StoredTensor("U32", np.zeros((48, 32), np.uint32))
    apart = tmp_path / "apart"
    apart.mkdir()
    write_file(apart / "model.safetensors", tensors, metadata={})
    with pytest.raises(CheckpointError) as refused:
        find_vision(open_index(text), apart)
    assert name in str(refused.value)
    assert "--no-vision" in str(refused.value)


def test_the_tower_of_another_model_is_refused(make: Make) -> None:
    whole, text = make("whole"), make("text", vision=False, prefix=True)
    edit(whole, lambda raw: raw["vision_config"].update(patch_size=16))
    with pytest.raises(ConfigError, match="the tower of another model"):
        find_vision(open_index(text), whole)


def test_a_directory_without_a_tower_is_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(NotACheckpointError, match="no vision tower here"):
        find_vision(open_index(make("text", vision=False, prefix=True)), make("other", vision=False))
    with pytest.raises(NotACheckpointError, match="takes no pictures"):
        find_vision(open_index(make("plain", vision=False)), make("whole"))
    for nowhere in (tmp_path / "nowhere", make("whole") / "config.json"):
        with pytest.raises(NotACheckpointError, match="no such directory"):
            find_vision(open_index(make("whole")), nowhere)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("patch_size", None, "patch_size is missing"),
        ("vt_hidden_size", -4, "vt_hidden_size has no possible value"),
        ("vt_num_attention_heads", 3, "contradicts itself"),
        ("merge_kernel_size", [2], "merge_kernel_size has no possible value"),
        ("merge_type", "mean", "merge_type is not implemented"),
        ("mm_projector_type", "mlp", "mm_projector_type is not implemented"),
        ("projector_ln_eps", 0, "projector_ln_eps has no possible value"),
        ("text_hidden_size", 4096, "text_hidden_size is not implemented"),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_name(make: Make, key: str, value: object, words: str) -> None:
    directory = make()
    edit(directory, lambda raw: raw["vision_config"].update({key: value}))
    with pytest.raises((ConfigError, CheckpointProblems), match=words):
        find_vision(open_index(directory))


def test_inspect_and_doctor_tell_of_the_tower(make: Make, tmp_path: Path) -> None:
    whole, text = make("whole"), make("text", vision=False, prefix=True)
    for report in (inspect(whole), doctor(whole)):
        assert [note for note in report.notes if note.startswith("takes pictures: a vision tower of 35 tensors")]
        assert not [note for note in report.notes if "skipped" in note]
    for report in (inspect(text), doctor(text)):
        assert [note for note in report.notes if note.startswith("text only")]
    assert inspect(text).ok and doctor(text).healthy
    edit(whole, lambda raw: raw["vision_config"].update(vt_num_hidden_layers=3))
    assert not inspect(whole).ok and not doctor(whole).healthy
    assert "vision_tower.encoder.blocks.2.norm0.weight" in doctor(whole).to_text()


def test_the_fingerprint_of_a_tower_follows_its_weights_and_not_its_files(make: Make) -> None:
    def fingerprint(**options: object) -> str:
        found = find_vision(open_index(make(str(options), **options)))
        assert isinstance(found, VisionManifest)
        return tower_fingerprint(found)

    assert fingerprint(seed=1) == fingerprint(seed=1, shards=3)
    assert len({fingerprint(seed=1), fingerprint(seed=2), fingerprint(seed=1, dtype="F32")}) == 3
