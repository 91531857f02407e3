"""A checkpoint's way with text: tokenizer, chat template and recommended sampling, read once and handed on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from exo_kimi.chat.defaults import GenerationDefaults
from exo_kimi.chat.template import ChatTemplate
from exo_kimi.chat.tokenizer import KimiTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Speaker:
    """How a checkpoint reads and writes text, and how it likes to be sampled."""

    tokenizer: KimiTokenizer
    template: ChatTemplate
    defaults: GenerationDefaults

    @classmethod
    def from_directory(cls, directory: Path) -> Speaker:
        """Of a checkpoint.

        Raises:
            TokenizerError, TemplateError: its files are missing or malformed.
        """
        tokenizer = KimiTokenizer.from_directory(directory)
        return cls(
            tokenizer=tokenizer,
            template=ChatTemplate.from_directory(directory, tokenizer),
            defaults=GenerationDefaults.from_directory(directory, tokenizer),
        )
