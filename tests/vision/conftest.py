"""A tiny Kimi K2.5 with a tower, its peer in transformers, and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exo_kimi.arch.vision import Grid
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.pictures.picture import Picture

SMALL = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "n_routed_experts": 4}
LAYERS = 3


@pytest.fixture(scope="session")
def vision_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = SMALL | {"num_hidden_layers": LAYERS}
    return make_tiny(
        tmp_path_factory.mktemp("vision") / "tiny",
        vision=True,
        layout="bf16",
        dtype="F32",
        seed=5,
        config=config,
        template="k25",
    )


@pytest.fixture(scope="session")
def theirs(vision_checkpoint: Path) -> Any:
    """transformers' model of the same directory; it does not read the published vt_* keys."""
    torch = pytest.importorskip("torch", reason="the oracle runs on torch")
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "Kimi_K25ForConditionalGeneration"):
        pytest.skip("this transformers has no Kimi K2.5")
    from transformers.models.kimi_k25.configuration_kimi_k25 import Kimi_K25Config, Kimi_K25VisionConfig

    raw = json.loads((vision_checkpoint / "config.json").read_text())
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
        vision_checkpoint, config=config, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def picture_of(grid: Grid, *, seed: int = 0, patch: int = 14) -> Picture:
    """Noise on a grid."""
    shape = (grid.frames, grid.rows * patch, grid.columns * patch, 3)
    return Picture.of(grid, np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8).tobytes())


def pixels_of(picture: Picture, *, patch: int = 14) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(frames, height, width, 3)."""
    grid = picture.grid
    shape = (grid.frames, grid.rows * patch, grid.columns * patch, 3)
    return np.frombuffer(picture.pixels, np.uint8).reshape(shape)


def patches_of(picture: Picture, patch: int = 14) -> np.ndarray[Any, np.dtype[np.float32]]:
    """(patches, 3, patch, patch) as transformers takes them."""
    grid = picture.grid
    cut = pixels_of(picture).reshape(grid.frames, grid.rows, patch, grid.columns, patch, 3).transpose(0, 1, 3, 5, 2, 4)
    return (cut.reshape(-1, 3, patch, patch) / 255 - 0.5).astype(np.float32) / 0.5
