"""exo's model card of a Kimi, as its API and its TOML files write it.

Source: exo `shared/models/model_cards.py` at b5375f8ce; v1.0.71 has no `backends` and refuses the key. storageSize
is of the whole model, in bytes.
"""

from __future__ import annotations

from typing import Any

import tomli_w

from exo_kimi.arch.config import KimiConfig

Card = dict[str, Any]
BACKENDS = ("MlxMetal", "MlxCuda", "MlxCpu")


def make_card(model_id: str, config: KimiConfig, total_bytes: int) -> Card:
    """A card for `POST /instance`, in camelCase."""
    return {
        "modelId": model_id,
        "storageSize": {"inBytes": total_bytes},
        "nLayers": config.num_hidden_layers,
        "hiddenSize": config.hidden_size,
        "supportsTensor": True,
        "numKeyValueHeads": config.num_attention_heads,
        "contextLength": config.max_position_embeddings,
        "tasks": ["TextGeneration"],
        "backends": list(BACKENDS),
        "family": "kimi",
        "trustRemoteCode": True,
    }


def card_toml(card: Card) -> str:
    """The same card as a file for EXO_RESOURCES_DIR/inference_model_cards; keys in snake_case."""
    size = {"storage_size": {"in_bytes": card["storageSize"]["inBytes"]}}
    return tomli_w.dumps({_snake(key): value for key, value in card.items() if key != "storageSize"} | size)


def _snake(key: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in key)
