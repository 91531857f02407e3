"""Our tokenizer and chat template with the few methods that legacy exo calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exo_kimi.chat.guard import TextGuard
from exo_kimi.chat.tokenizer import Detokenizer
from exo_kimi.dialogue.speaker import Speaker

END_OF_TURN = "<|im_end|>"


class StopIds(int):
    """The end of turn as an integer that equals every stop id: legacy exo compares each token with one id, by `==`.

    Python asks the subclass first, so `token == stop` is answered here whichever side it stands on.
    """

    ids: frozenset[int]

    def __new__(cls, ids: frozenset[int], *, first: int) -> StopIds:
        made = super().__new__(cls, first)
        made.ids = ids
        return made

    def __eq__(self, other: object) -> bool:
        return other in self.ids if isinstance(other, int) else NotImplemented

    def __ne__(self, other: object) -> bool:
        return other not in self.ids if isinstance(other, int) else NotImplemented

    def __hash__(self) -> int:
        return int.__hash__(self)


class RenderedPrompt(str):
    """A prompt's text with its ids: a control token's name that a user typed stays text in them."""

    ids: tuple[int, ...]

    def __new__(cls, text: str, ids: Sequence[int]) -> RenderedPrompt:
        made = super().__new__(cls, text)
        made.ids = tuple(ids)
        return made


class LegacyTokenizer:
    """What legacy exo asks of a Hugging Face tokenizer.

    Args:
        speaker: of the checkpoint.
        streaming: of one reply, whose tokens come in one list after another: a character may end in a later list.
    """

    def __init__(self, speaker: Speaker, *, streaming: bool = False) -> None:
        self.speaker = speaker
        self._tokenizer = tokenizer = speaker.tokenizer
        self.eos_token_id = StopIds(tokenizer.stop_ids, first=tokenizer.special[END_OF_TURN])
        self.vocab_size = tokenizer.vocab_size
        self._stream: Detokenizer | None = tokenizer.detokenizer() if streaming else None
        self._last: Sequence[int] | None = None
        self._last_text = ""

    @classmethod
    def from_directory(cls, directory: Path) -> LegacyTokenizer:
        """Of a checkpoint.

        Raises:
            TokenizerError, TemplateError: its files are missing or malformed.
        """
        return cls(Speaker.from_directory(directory))

    def of_reply(self) -> LegacyTokenizer:
        """The same for one reply."""
        return LegacyTokenizer(self.speaker, streaming=True)

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tokenize: bool = True,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> RenderedPrompt | list[int]:
        """The prompt of a conversation, as text that carries its ids.

        Raises:
            RequestError: a message that no text template can take.
            TemplateError: the template refuses the messages.
        """
        prompt = self.speaker.template.render(conversation, tools=tools, add_generation_prompt=add_generation_prompt)
        return prompt.ids if tokenize else RenderedPrompt(prompt.text, prompt.ids)

    def encode(self, text: str) -> list[int]:
        """Token ids. Text that another tokenizer rendered carries no ids: names of control tokens in it become them."""
        if isinstance(text, RenderedPrompt):
            return list(text.ids)
        parts = TextGuard(self._tokenizer.special, ()).split(text)
        return [each for part in parts for each in ([part] if isinstance(part, int) else self._tokenizer.encode(part))]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without the end of the turn."""
        kept = [int(token) for token in tokens if int(token) not in self._tokenizer.stop_ids]
        if self._stream is None:
            return self._tokenizer.decode(kept)
        if tokens is not self._last:  # exo decodes each list twice
            ended = len(kept) < len(tokens)
            self._last_text = "".join(map(self._stream.feed, kept)) + (self._stream.flush() if ended else "")
            self._last = tokens
        return self._last_text
