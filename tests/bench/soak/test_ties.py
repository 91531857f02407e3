"""Two answers differ by a tie, and by nothing else, or one of them is wrong."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from exo_kimi.bench.soak import ties
from exo_kimi.bench.soak.clients import SEED, SoakPrompt
from exo_kimi.bench.soak.ties import TieJudge, choices
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.runtime.stage.sampling import uniform


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> TieJudge:
    return TieJudge(make_tiny(tmp_path_factory.mktemp("ties") / "tiny"))


def answer(judge: TieJudge, question: SoakPrompt, *, other_way_at: int | None = None) -> str:
    """What the model says; at one draw, the second of the tokens that may be drawn."""
    tokenizer = judge._speaker.tokenizer
    inputs = list(judge._speaker.template.render([{"role": "user", "content": question.text}]).ids)
    cache, ids = judge._model.make_cache(), []
    while len(ids) < question.max_tokens:
        logits = np.array(judge._model(mx.array([inputs]), cache)[0, -1], np.float64)
        ids.append(choices(logits, question.temperature, len(ids))[len(ids) == other_way_at])
        assert ids[-1] not in tokenizer.stop_ids
        inputs = ids[-1:]
    return tokenizer.decode(ids)


@pytest.mark.parametrize(("temperature", "tie"), [(0.7, 0.02), (0.0, 10.0)])
def test_a_draw_on_the_border_explains_another_answer_and_a_draw_elsewhere_does_not(
    judge: TieJudge, temperature: float, tie: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = SoakPrompt("7: lamp stone", 12, temperature)
    one = answer(judge, question)
    with monkeypatch.context() as patch:
        patch.setattr(ties, "TIE", tie)
        other = answer(judge, question, other_way_at=5)
        assert other != one
        assert judge.is_tie(question, one, other)
        assert not judge.is_tie(question, one, other[:-1] + "~")
    assert not judge.is_tie(question, one, other)
    assert judge.is_tie(question, one, one)
    assert not judge.is_tie(question, one, one[:-2])


def test_a_draw_has_the_tokens_beside_its_border_and_no_other() -> None:
    n = 3
    point = uniform(SEED, n)
    weights = np.array([point - 1e-6, 0.01, 1 - point - 0.01 + 1e-6])
    assert choices(np.log(weights), 1.0, n) == [1, 0]
    weights = np.array([point - 1e-3, 0.01, 1 - point - 0.01 + 1e-3])
    assert choices(np.log(weights), 1.0, n) == [1]
    assert choices(np.array([0.0, 5.0, 5.0 + 1e-7, 4.9]), 0.0, n) == [2, 1]
