"""Sampling defaults of a checkpoint, for requests that state none.

Source: the temperatures are those of Moonshot's model cards: K2-Instruct and K2-Instruct-0905 0.6; K2-Thinking 1.0; K2.5 and
later 1.0 with top_p 0.95 when thinking, 0.6 with top_p 0.95 when not ("instant"). A `temperature` or `top_p` in
generation_config.json is the checkpoint's own word and wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exo_kimi.chat.family import Family, family_of
from exo_kimi.chat.tokenizer import KimiTokenizer
from exo_kimi.chat.tokenizer_files import GENERATION_FILE, read_json_object, read_model_config
from exo_kimi.errors import TokenizerError


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """Temperature (0 is greedy) and nucleus mass; 1.0 and 1.0 change nothing."""

    temperature: float
    top_p: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Sampling defaults and context length of one checkpoint.

    Args:
        family: the chat family they come from.
        thinking: used when the reply may begin with reasoning.
        instant: used when it may not.
        max_context: positions that generation_config.json (`max_length`) or config.json (`max_position_embeddings`) allow;
            None when neither says.
        thinks_by_default: whether a request that says nothing gets reasoning.
    """

    family: Family
    thinking: SamplingDefaults
    instant: SamplingDefaults
    max_context: int | None
    thinks_by_default: bool

    def sampling(self, thinking: bool | None = None) -> SamplingDefaults:
        """The defaults for a request with this `thinking` argument (None when it has none)."""
        thinks = self.thinks_by_default if thinking is None else thinking
        return self.thinking if thinks else self.instant

    @classmethod
    def from_directory(
        cls, path: Path | str, tokenizer: KimiTokenizer, *, raw_config: Mapping[str, Any] | None = None
    ) -> GenerationDefaults:
        """Read the defaults of a checkpoint directory; `raw_config` is its config.json, where that was read already.

        Raises:
            TokenizerError: generation_config.json or config.json is malformed.
        """
        directory = Path(path)
        config = read_model_config(directory) if raw_config is None else raw_config
        family = family_of(config, tokenizer)
        generation_path = directory / GENERATION_FILE
        generation = read_json_object(generation_path, required=False)
        text_config = config.get("text_config")
        if isinstance(text_config, dict):
            config = text_config
        thinking, instant = BY_FAMILY[family]
        stated = {
            key: value
            for key, highest in (("temperature", 100.0), ("top_p", 1.0))
            if (value := _number(generation, key, highest, generation_path)) is not None
        }
        return cls(
            family=family,
            thinking=replace(thinking, **stated),
            instant=replace(instant, **stated),
            max_context=_positive(generation.get("max_length")) or _positive(config.get("max_position_embeddings")),
            thinks_by_default=family != "instruct",
        )


BY_FAMILY: dict[Family, tuple[SamplingDefaults, SamplingDefaults]] = {
    "instruct": (SamplingDefaults(temperature=0.6), SamplingDefaults(temperature=0.6)),
    "thinking": (SamplingDefaults(temperature=1.0), SamplingDefaults(temperature=1.0)),
    "k25": (SamplingDefaults(temperature=1.0, top_p=0.95), SamplingDefaults(temperature=0.6, top_p=0.95)),
}


def _number(raw: dict[str, Any], key: str, highest: float, path: Path) -> float | None:
    value = raw.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= highest:
        raise TokenizerError(
            f"{path.name} has a {key} out of range", expected=f"0 to {highest:g}", found=repr(value), where=path
        )
    return float(value)


def _positive(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
