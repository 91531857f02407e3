"""The small model's vocabulary: byte pairs merged on the training text, under Kimi's split pattern."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from random import Random
from typing import Any

import regex

from exo_kimi.chat.tokenizer import SPLIT_PATTERN
from exo_kimi.checkpoint.tiny.tokenizer import learn_tokens
from exo_kimi.train.data.conversations import training_conversation

_SPLIT = regex.compile(SPLIT_PATTERN, regex.V1)
RANKS = 2000
_SAMPLE = 20_000


def train_ranks(seed: int, ranks: int = RANKS, conversations: int = _SAMPLE) -> tuple[bytes, ...]:
    """Learn tokens, in rank order, from as many conversations.

    Digits are never merged: a number is spelled one token a digit, which is how sums are learnt from few examples.
    """
    rng = Random(f"tokenizer {seed}")
    pieces: Counter[str] = Counter()
    for _ in range(conversations):
        conversation = training_conversation(rng)
        for text in _strings([conversation.messages, conversation.tools]):
            pieces.update(_SPLIT.findall(text))
    for piece in [piece for piece in pieces if piece.strip().isdigit()]:
        del pieces[piece]
    return learn_tokens(pieces, ranks)


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
