"""Encode conversations as token ids, with the places where the loss is taken.

Prompts are rendered by the checkpoint's own chat template, so that training and measuring see what serving renders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from exo_kimi.chat.template import ChatTemplate, ReasoningMode
from exo_kimi.chat.tokenizer import KimiTokenizer


class Conversation(Protocol):
    """Messages in the OpenAI shape, the last of them by the assistant, with the tools that are declared."""

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages."""

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        """The declared tools."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A text as (L,) token ids; `counted` says of each whether the loss counts it. `domain` is what the text is about."""

    ids: NDArray[np.int32]
    counted: NDArray[np.bool_]
    domain: str = ""


class Encoder:
    """Encoder with one tokenizer and chat template.

    Args:
        tokenizer: whose special tokens bound the turns.
        template: renders every message but the last.
    """

    def __init__(self, tokenizer: KimiTokenizer, template: ChatTemplate) -> None:
        self.tokenizer = tokenizer
        self.template = template
        special = tokenizer.special
        self._assistant, self._middle = special["<|im_assistant|>"], special["<|im_middle|>"]
        self._end = special["<|im_end|>"]

    @classmethod
    def from_directory(cls, directory: Path) -> Encoder:
        """The encoder of a directory with tokenizer files and a template.

        Raises:
            TokenizerError, TemplateError: they cannot be read.
        """
        tokenizer = KimiTokenizer.from_directory(directory)
        return cls(tokenizer, ChatTemplate.from_directory(directory, tokenizer))

    def encode(self, conversation: Conversation, *, domain: str = "") -> Encoded:
        """Encode prompt and reply; earlier replies are counted unless the template took their reasoning away. An assistant's
        message with the weight 0 is not counted, as in OpenAI's files for fine-tuning."""
        *earlier, last = conversation.messages
        rendered = self.template.render(earlier, conversation.tools)
        prompt, reply = rendered.ids, self.reply(last, rendered.reasoning)
        counted = np.zeros(len(prompt) + len(reply), bool)
        replies = [message for message in earlier if message["role"] == "assistant"]
        starts = [place for place, token in enumerate(prompt) if token == self._assistant]
        for message, start in zip(replies, starts, strict=False):
            if not message.get("reasoning_content") and message.get("weight", 1):
                first = prompt.index(self._middle, start) + 1
                counted[first : prompt.index(self._end, first) + 1] = True
        counted[len(prompt) :] = bool(last.get("weight", 1))
        return Encoded(ids=np.array(prompt + reply, np.int32), counted=counted, domain=domain)

    def reply(self, message: Mapping[str, Any], mode: ReasoningMode) -> list[int]:
        """Token ids that the model has to generate: `<think>` reasoning `</think>` text, calls, `<|im_end|>`.

        Args:
            mode: how the prompt left the think tags; there are none where the model does not reason.
        """
        special, encode = self.tokenizer.special, self.tokenizer.encode
        ids: list[int] = []
        if mode != "none":
            ids = [special["<think>"]] if mode == "may_open" else []
            ids += [*encode(message.get("reasoning_content") or ""), special["</think>"]]
        ids += encode(message.get("content") or "")
        if message.get("tool_calls"):
            ids.append(special["<|tool_calls_section_begin|>"])
            for call in message["tool_calls"]:
                ids += [special["<|tool_call_begin|>"], *encode(call["id"]), special["<|tool_call_argument_begin|>"]]
                ids += [*encode(call["function"]["arguments"]), special["<|tool_call_end|>"]]
            ids.append(special["<|tool_calls_section_end|>"])
        return [*ids, self._end]
