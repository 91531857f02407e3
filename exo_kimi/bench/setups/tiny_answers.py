"""Greedy answers of the tiny Kimi of the package to held-out questions, for comparing two ways to compute them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from exo_kimi.chat.template import ChatTemplate
from exo_kimi.chat.tokenizer import KimiTokenizer
from exo_kimi.client.demo import shipped_model
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.runtime.loading.loader import load
from exo_kimi.train.evaluation.cases import question_cases

SEED = 7
MOST = 96
"""Tokens of one answer."""


@dataclass(frozen=True, slots=True)
class TinyReply:
    """What came, and whether that is what the question accepts."""

    tokens: list[int]
    right: bool


class TinyAnswers:
    """The shipped model, loaded as it is served, with float32 activations."""

    def __init__(self) -> None:
        directory = shipped_model()
        self.model: Model = load(directory, dtype="float32", fuse=True)
        self._tokenizer = KimiTokenizer.from_directory(directory)
        self._template = ChatTemplate.from_directory(directory, self._tokenizer)
        self._cases = question_cases(1, SEED)

    def ask(self, tokens: int, *, before: Callable[[Model], object]) -> list[TinyReply]:
        """Answers, one question after another, until so many tokens came or there are no more questions.

        Args:
            tokens: at least so many.
            before: called with the model before each question.
        """
        answers: list[TinyReply] = []
        for case in self._cases:
            if sum(len(answer.tokens) for answer in answers) >= tokens:
                break
            before(self.model)
            found = self._greedy(self._template.render(case.messages).ids)
            said = self._tokenizer.decode(token for token in found if not self._tokenizer.is_special(token))
            answers.append(TinyReply(found, any(said.endswith(reply) for reply in case.accepted)))
        return answers

    def _greedy(self, prompt: list[int]) -> list[int]:
        caches, found = self.model.make_cache(), list[int]()
        tokens = mx.array(prompt, dtype=mx.int32)
        while len(found) < MOST and not (found and found[-1] in self._tokenizer.stop_ids):
            hidden = self.model.forward_ragged(tokens, [(tokens.shape[0], caches)])
            found += mx.argmax(self.model.logits(hidden[-1:]), axis=-1).tolist()  # type: ignore[arg-type]
            tokens = mx.array(found[-1:], dtype=mx.int32)
        return found
