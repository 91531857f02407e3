"""One question with its answer, and the split that holds questions out of the training."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

HELD_OUT_SHARE = 8
"""One question in this many is never trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A question and its answer.

    Args:
        task: whose accuracy it counts for.
        key: what is asked; the split is a function of it, so that a held-out question occurs in no training text.
        question: the user's words.
        answer: the assistant's words.
        reasoning: the steps, for the think tags; empty where there is nothing to work out.
        brief: the answer in a word or two, for those who ask for it.
        accepted: other right answers.
    """

    task: str
    key: str
    question: str
    answer: str
    reasoning: str = ""
    brief: str = ""
    accepted: tuple[str, ...] = ()


Task = Callable[[Random], Turn]


def held_out(key: str) -> bool:
    """Whether a question belongs to the evaluation."""
    return zlib.crc32(key.encode()) % HELD_OUT_SHARE == 0


def draw(task: Task, rng: Random, *, evaluation: bool) -> Turn:
    """A question from one side of the split."""
    while True:
        turn = task(rng)
        if held_out(turn.key) is evaluation:
            return turn
