"""Encode conversations as token ids, with the places where the loss is taken.

Prompts are rendered by the checkpoint's own chat template, so that training sees what serving renders.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exo_kimi.chat.template import ChatTemplate, ReasoningMode
from exo_kimi.chat.tokenizer import KimiTokenizer
from exo_kimi.train.data.conversations import Message, TrainingConversation


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A conversation as (L,) token ids; `counted` says of each whether the loss counts it."""

    ids: NDArray[np.int32]
    counted: NDArray[np.bool_]


class Encoder:
    """Encoder with one tokenizer and chat template.

    Args:
        tokenizer: whose special tokens bound the turns.
        template: renders every message but the last.
    """

    def __init__(self, tokenizer: KimiTokenizer, template: ChatTemplate) -> None:
        self._tokenizer = tokenizer
        self._template = template
        special = tokenizer.special
        self._assistant, self._middle = special["<|im_assistant|>"], special["<|im_middle|>"]
        self._end = special["<|im_end|>"]

    def encode(self, conversation: TrainingConversation) -> Encoded:
        """Encode prompt and reply; earlier replies are counted unless the template took their reasoning away."""
        *earlier, last = conversation.messages
        rendered = self._template.render(earlier, conversation.tools)
        prompt, reply = rendered.ids, self.reply(last, rendered.reasoning)
        counted = np.zeros(len(prompt) + len(reply), bool)
        replies = [message for message in earlier if message["role"] == "assistant"]
        starts = [place for place, token in enumerate(prompt) if token == self._assistant]
        for message, start in zip(replies, starts, strict=False):
            if not message.get("reasoning_content"):
                first = prompt.index(self._middle, start) + 1
                counted[first : prompt.index(self._end, first) + 1] = True
        counted[len(prompt) :] = True
        return Encoded(ids=np.array(prompt + reply, np.int32), counted=counted)

    def reply(self, message: Message, mode: ReasoningMode) -> list[int]:
        """Token ids that the model has to generate: `<think>` reasoning `</think>` text, calls, `<|im_end|>`.

        Args:
            mode: how the prompt left the think tags; there are none where the model does not reason.
        """
        special, encode = self._tokenizer.special, self._tokenizer.encode
        ids: list[int] = []
        if mode != "none":
            ids = [special["<think>"]] if mode == "may_open" else []
            ids += [*encode(message.get("reasoning_content", "")), special["</think>"]]
        ids += encode(message["content"])
        if message.get("tool_calls"):
            ids.append(special["<|tool_calls_section_begin|>"])
            for call in message["tool_calls"]:
                ids += [special["<|tool_call_begin|>"], *encode(call["id"]), special["<|tool_call_argument_begin|>"]]
                ids += [*encode(call["function"]["arguments"]), special["<|tool_call_end|>"]]
            ids.append(special["<|tool_calls_section_end|>"])
        return [*ids, self._end]
