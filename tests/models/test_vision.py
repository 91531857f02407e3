"""The vision tower against transformers' Kimi_K25 in float32, and against itself under small budgets."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from exo_kimi.arch.vision import Grid
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.models.vision import VisionModel, cubic_weights
from exo_kimi.runtime.loading.vision import load_vision

GRIDS = [Grid(1, 8, 8), Grid(1, 4, 10), Grid(1, 12, 6), Grid(1, 2, 2), Grid(1, 16, 16), Grid(1, 6, 26), Grid(1, 30, 2)]
FILM = Grid(3, 4, 6)
BAR = 1e-5


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(
        tmp_path_factory.mktemp("tiny"), vision=True, layout="bf16", seed=5, config={"num_hidden_layers": 2}
    )


@pytest.fixture(scope="module")
def ours(directory: Path) -> VisionModel:
    return load_vision(directory, dtype="float32")


@pytest.fixture(scope="module")
def theirs(directory: Path) -> Any:
    torch = pytest.importorskip("torch", reason="the oracle runs on torch")
    transformers = pytest.importorskip("transformers")
    # torchvision's wheels do not fit torch's of the CPU; nothing of it is used.
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
    try:
        from transformers.models.kimi_k25.configuration_kimi_k25 import Kimi_K25Config, Kimi_K25VisionConfig
    except ImportError:
        pytest.skip("this transformers has no Kimi K2.5")
    raw = json.loads((directory / "config.json").read_text())
    stated = raw["vision_config"]
    vision = Kimi_K25VisionConfig(
        patch_size=stated["patch_size"],
        pos_emb_height=stated["init_pos_emb_height"],
        pos_emb_width=stated["init_pos_emb_width"],
        pos_emb_time=stated["init_pos_emb_time"],
        num_attention_heads=stated["vt_num_attention_heads"],
        num_hidden_layers=stated["vt_num_hidden_layers"],
        hidden_size=stated["vt_hidden_size"],
        intermediate_size=stated["vt_intermediate_size"],
        merge_kernel_size=stated["merge_kernel_size"],
    )
    ours_only = ("architectures", "model_type", "torch_dtype", "transformers_version")
    text = transformers.DeepseekV3Config(**{k: v for k, v in raw["text_config"].items() if k not in ours_only})
    config = Kimi_K25Config(
        text_config=text,
        vision_config=vision,
        projection_hidden_size=stated["mm_hidden_size"],
        image_token_id=raw["media_placeholder_token_id"],
        tie_word_embeddings=False,
    )
    model, info = transformers.Kimi_K25ForConditionalGeneration.from_pretrained(
        directory, config=config, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def picture(grid: Grid, *, patch: int = 14, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    shape = (grid.frames, grid.rows * patch, grid.columns * patch, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def as_patches(pixels: np.ndarray[Any, Any], grid: Grid, patch: int = 14) -> np.ndarray[Any, np.dtype[np.float32]]:
    cut = pixels.reshape(grid.frames, grid.rows, patch, grid.columns, patch, 3).transpose(0, 1, 3, 5, 2, 4)
    return (cut.reshape(-1, 3, patch, patch) / 255 - 0.5).astype(np.float32) / 0.5


@pytest.mark.parametrize("grid", [*GRIDS, FILM], ids=str)
def test_vectors_are_those_of_transformers(ours: VisionModel, theirs: Any, grid: Grid) -> None:
    import torch

    pixels = picture(grid)
    with torch.no_grad():
        features = theirs.model.get_image_features(
            torch.tensor(as_patches(pixels, grid)), torch.tensor([[grid.frames, grid.rows, grid.columns]])
        )
    expected = np.concatenate([np.asarray(part) for part in features.pooler_output])
    found = np.array(ours(mx.array(pixels), grid))
    assert found.shape == (ours.config.tokens(grid), ours.config.hidden_size)
    assert np.abs(found - expected.reshape(found.shape)).max() <= BAR * expected.std()


def test_a_small_budget_changes_nothing_and_is_kept(ours: VisionModel) -> None:
    grid = Grid(1, 40, 60)
    pixels = mx.array(picture(grid, seed=1))
    patches, element = grid.patches, 4
    whole_scores = ours.config.vt_num_attention_heads * patches**2 * element
    ours.scratch_bytes = 1 << 31
    expected = np.array(ours(pixels, grid))
    budget = 12 << 20
    assert ours.config.scratch_bytes(patches, element_bytes=element) < budget < whole_scores
    ours.scratch_bytes = budget
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    found = np.array(ours(pixels, grid))
    # Beside it: the patches as float32 and as they are cut, before the first block.
    assert mx.get_peak_memory() - before <= budget + 3 * patches * 3 * 14 * 14 * 4
    assert np.abs(found - expected).max() <= 1e-5 * expected.std()


def test_places_that_need_no_resampling_are_those_of_the_table() -> None:
    assert np.array_equal(cubic_weights(8, 8), np.eye(8, dtype=np.float32))


@pytest.mark.parametrize("wanted", [1, 3, 5, 8, 13, 64])
def test_cubic_weights_of_a_place_sum_to_one(wanted: int) -> None:
    assert np.allclose(cubic_weights(8, wanted).sum(axis=1), 1, atol=1e-6)
