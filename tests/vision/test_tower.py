"""The vision tower against transformers' Kimi_K25 in float32, and against itself under small budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from exo_kimi.arch.vision import Grid
from exo_kimi.models.vision import VisionModel, cubic_weights
from exo_kimi.runtime.loading.vision import load_vision
from tests.vision.conftest import patches_of, picture_of, pixels_of

GRIDS = [
    *[Grid(1, 8, 8), Grid(1, 4, 10), Grid(1, 12, 6), Grid(1, 2, 2), Grid(1, 16, 16), Grid(1, 6, 26), Grid(1, 30, 2)],
    Grid(1, 22, 34),
]
FILM = Grid(3, 4, 6)
BAR = 1e-5


@pytest.fixture(scope="module")
def ours(vision_checkpoint: Path) -> VisionModel:
    return load_vision(vision_checkpoint, dtype="float32")


@pytest.mark.parametrize("grid", [*GRIDS, FILM], ids=str)
def test_vectors_are_those_of_transformers(ours: VisionModel, theirs: Any, grid: Grid) -> None:
    import torch

    picture = picture_of(grid)
    with torch.no_grad():
        features = theirs.model.get_image_features(
            torch.tensor(patches_of(picture)), torch.tensor([[grid.frames, grid.rows, grid.columns]])
        )
    expected = np.concatenate([np.asarray(part) for part in features.pooler_output])
    found = np.array(ours(mx.array(pixels_of(picture)), grid))
    assert found.shape == (ours.config.tokens(grid), ours.config.hidden_size)
    assert np.abs(found - expected.reshape(found.shape)).max() <= BAR * expected.std()


def test_a_small_budget_changes_nothing_and_is_kept(ours: VisionModel) -> None:
    grid = Grid(1, 40, 60)
    pixels = mx.array(pixels_of(picture_of(grid, seed=1)))
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
