"""exo's model card of a Kimi, as its API and its TOML files write it.

Source: exo `shared/models/model_cards.py` at b5375f8ce; v1.0.71 has no `backends` and no `reasoning_dialect`, and refuses the
keys. storageSize is of the whole model, in bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tomli_w

from exo_kimi.arch.config import KimiConfig
from exo_kimi.plugin.ours_alone import runs_on_ours_alone

if TYPE_CHECKING:
    from exo_kimi.dialogue.speaker import Speaker

Card = dict[str, Any]
CARD_FILE = "exo_model_card.toml"
BACKENDS = ("MlxMetal", "MlxCuda", "MlxCpu")
_BASE_MODELS = {"instruct": "Kimi K2", "thinking": "Kimi K2 Thinking", "k25": "Kimi K2.5"}
_ASKED = [{"role": "user", "content": "Hi"}]


def make_card(model_id: str, config: KimiConfig, total_bytes: int, speaker: Speaker | None = None) -> Card:
    """A card for `POST /instance`, in camelCase.

    Args:
        model_id: exo's.
        config: of the checkpoint.
        total_bytes: of its weights.
        speaker: of the checkpoint: whether it thinks, and how it is sampled. None leaves that out.
    """
    card = {
        "modelId": model_id,
        "storageSize": {"inBytes": total_bytes},
        "nLayers": config.num_hidden_layers,
        "hiddenSize": config.hidden_size,
        "supportsTensor": runs_on_ours_alone(config) is None,
        "numKeyValueHeads": config.num_attention_heads,
        "contextLength": config.max_position_embeddings,
        "tasks": ["TextGeneration"],
        "backends": list(BACKENDS),
        "family": "kimi",
        "trustRemoteCode": True,
    }
    card |= {} if speaker is None else _chat_fields(speaker)
    return card | ({"baseModel": "Kimi Linear"} if config.has_states and speaker is not None else {})


def _chat_fields(speaker: Speaker) -> Card:
    """What exo's dashboard and API ask of a chat: the toggle for thinking, and sampling where a request says nothing."""
    thinks, thinks_when_off = (
        speaker.template.render(_ASKED, thinking=asked).reasoning != "none" for asked in (True, False)
    )
    toggle = thinks and not thinks_when_off
    defaults = speaker.defaults
    sampling: Card = {"temperature": defaults.sampling().temperature, "topP": defaults.sampling().top_p}
    if toggle:
        for name, asked in (("thinking", True), ("nonThinking", False)):
            chosen = defaults.sampling(asked)
            sampling[name] = {"temperature": chosen.temperature, "topP": chosen.top_p}
    return {
        "baseModel": _BASE_MODELS[defaults.family],
        "capabilities": ["text", *["thinking"] * thinks, *["thinking_toggle"] * toggle],
        # Earlier reasoning is part of the text of a turn, so a client need not send it back.
        "reasoningDialect": "suffix" if thinks else "none",
        "samplingDefaults": sampling,
    }


def card_toml(card: Card) -> str:
    """The same card as a file for EXO_RESOURCES_DIR/inference_model_cards; keys in snake_case."""
    return tomli_w.dumps(_snake_keys(card))


def _snake_keys(card: Card) -> Card:
    return {_snake(key): _snake_keys(value) if isinstance(value, dict) else value for key, value in card.items()}


def _snake(key: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in key)
