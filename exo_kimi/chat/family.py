"""The three chat families of Kimi checkpoints, and which one a checkpoint belongs to.

instruct   K2-Instruct, K2-Instruct-0905: no think tags in the vocabulary
thinking   K2-Thinking: think tags, the model opens them itself
k25        K2.5, K2.6, K2.7-Code: think tags, opened or closed by the generation prompt
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from exo_kimi.chat.tokenizer import KimiTokenizer

Family = Literal["instruct", "thinking", "k25"]
THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"


def family_of(raw_config: Mapping[str, Any], tokenizer: KimiTokenizer) -> Family:
    """The family of a checkpoint, from `model_type` in config.json and from the vocabulary, never from a directory name."""
    if raw_config.get("model_type") == "kimi_k25":
        return "k25"
    return "thinking" if THINK_OPEN in tokenizer.special else "instruct"
