"""The published Kimi models by name, so that a plan can be made before anything is downloaded."""

from __future__ import annotations

from dataclasses import dataclass

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.vision import VisionConfig
from exo_kimi.errors import UsageError
from exo_kimi.planner import data


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedModel:
    """A model as its repository publishes it. `default_recipe` is what MLX holds after loading it as published; `vision` is
    None where it takes no pictures, or of a tower whose `tower_bytes` alone are known."""

    name: str
    repository: str
    published: str
    default_recipe: str
    config: KimiConfig
    vision: VisionConfig | None
    tower_bytes: int = 0


def model_names() -> tuple[str, ...]:
    """Every name that `published_model` knows."""
    return data.names("models")


def published_model(name: str) -> PublishedModel:
    """A published model; case and a leading `moonshotai/` do not matter.

    Raises:
        UsageError: no such model; says which there are.
    """
    key = name.strip().lower().removeprefix("moonshotai/")
    if key not in model_names():
        raise UsageError(
            "unknown model", expected=f"one of {', '.join(model_names())}", found=repr(name), where="--model"
        )
    return read_model("models", key)


def read_model(folder: str, key: str) -> PublishedModel:
    """A model from its file in a data folder of the planner; `key` is the file's stem."""
    table = data.load(folder, key)
    raw = {"q_lora_rank": None, **table["config"]}  # TOML has no null
    if table["nested"]:
        raw = {"model_type": table.get("nested_as", "kimi_k25"), "text_config": raw}
    config = KimiConfig.from_dict(raw, where=f"{key}.toml")
    outer = {
        "vision_config": table.get("vision"),
        "media_placeholder_token_id": table.get("media_placeholder_token_id"),
    }
    return PublishedModel(
        name=table["name"],
        repository=table["repository"],
        published=table["published"],
        default_recipe=table["default_recipe"],
        config=config,
        vision=VisionConfig.from_dict(outer, hidden_size=config.hidden_size, where=f"{key}.toml"),
        tower_bytes=table.get("tower_bytes", 0),
    )
