"""Whether two answers to one question differ by a tie of floating-point numbers and by nothing else.

A request that outlived its stage is prefilled again, in other chunks than at first, beside other sequences: its logits then
differ in the last digits, and a draw that lies within those digits of the border between two tokens goes either way. After 200
tokens at temperature 0.7 that is one answer in some hundreds. It is proven for each, by the model itself in one piece, or the
answer is wrong.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from exo_kimi.bench.soak.clients import SEED, SoakPrompt
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.runtime.loading.loader import load_stage
from exo_kimi.runtime.stage.sampling import uniform

TIE = 1e-5
"""Of the whole weight, for a draw, or of a logit's deviation, between the two best. Logits of one token, in chunks of 1 to 128,
differed by 1.6e-5, and borders by 1.7e-6 of the weight (fp32, the soak's model, Linux)."""


class TieJudge:
    """The model of a soak's checkpoint, in one piece, in float32.

    Args:
        checkpoint: its directory.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._speaker = Speaker.from_directory(checkpoint)
        self._model = load_stage(Checkpoint(checkpoint).manifest(), dtype="float32")

    def is_tie(self, question: SoakPrompt, one: str, other: str) -> bool:
        """Whether both answers are what the model says when draws within `TIE` of a border go either way."""
        return self._says(question, one) and self._says(question, other)

    def _says(self, question: SoakPrompt, text: str) -> bool:
        tokenizer = self._speaker.tokenizer
        prompt = self._speaker.template.render([{"role": "user", "content": question.text}])
        cache = self._model.make_cache()
        inputs, ids = list(prompt.ids), list[int]()
        while len(ids) < question.max_tokens:
            logits = np.array(self._model(mx.array([inputs]), cache)[0, -1], np.float64)
            for token_id in choices(logits, question.temperature, len(ids)):
                if token_id in tokenizer.stop_ids:
                    if tokenizer.decode(ids) == text:
                        return True
                elif text.startswith(tokenizer.decode([*ids, token_id]).rstrip("\ufffd")):
                    ids.append(token_id)
                    break
            else:
                return False
            inputs = ids[-1:]
        return tokenizer.decode(ids).rstrip("\ufffd") == text.rstrip("\ufffd")


def choices(logits: npt.NDArray[np.float64], temperature: float, n: int) -> list[int]:
    """Tokens that the n-th draw may give, the one that it gives here first.

    Args:
        logits: (vocabulary,).
        temperature: 0 takes the largest.
        n: how many tokens were drawn before.
    """
    if temperature == 0:
        best = int(logits.argmax())
        near = np.flatnonzero(logits >= logits[best] - TIE * logits.std())
        return [best, *(int(each) for each in near if each != best)]
    cumulative = np.exp((logits - logits.max()) / temperature).cumsum()
    point, slack = uniform(SEED, n) * cumulative[-1], TIE * cumulative[-1]
    drawn, low, high = (int(cumulative.searchsorted(at, side="right")) for at in (point, point - slack, point + slack))
    return [drawn, *(each for each in range(low, min(high, len(logits) - 1) + 1) if each != drawn)]
