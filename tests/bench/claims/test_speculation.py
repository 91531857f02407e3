"""The replay says its script whatever is guessed, and the bytes of both sides are those of the law."""

from __future__ import annotations

import pytest

from exo_kimi.bench.claims.speculation import RANDOM_BAR, REPEATING_BAR, Words, decode, row
from exo_kimi.bench.setups.replay import ReplayPipeline
from exo_kimi.planner.command import model_bytes
from exo_kimi.runtime.requests import GenerationRequest

LOOP = tuple([1, 2, 3, 4, 5, 6, 7] * 30)


def request_of(prompt: tuple[int, ...], new: int) -> GenerationRequest:
    return GenerationRequest(request_id="r", prompt_ids=prompt, max_tokens=new)


def test_a_script_is_said_with_and_without_guesses_and_bytes_are_those_of_the_law() -> None:
    model = model_bytes(model="kimi-k2-instruct", recipe="int4-q8")
    request = request_of(LOOP[:14], 100)
    plain = decode(lambda: ReplayPipeline(LOOP, vocab_size=10), request, model, limit=0)
    guessed = decode(lambda: ReplayPipeline(LOOP, vocab_size=10), request, model, limit=8)
    assert plain.tokens == guessed.tokens == LOOP[14:114]
    assert (plain.steps, plain.drafted) == (100, 0)
    cached = sum(range(15, 114)) * model.kv_token_bytes
    assert plain.read_bytes == pytest.approx(99 * model.active_bytes() + cached, rel=1e-3)
    assert guessed.steps < 30
    assert guessed.read_bytes < plain.read_bytes / 1.5


def test_a_row_passes_only_on_the_right_side_of_its_bar() -> None:
    model = model_bytes(model="kimi-k2-instruct", recipe="int4-q8")
    still = tuple(range(200))
    for script, bar, other_bar in ((LOOP, REPEATING_BAR, RANDOM_BAR), (still, RANDOM_BAR, REPEATING_BAR)):
        for each, ok in ((bar, True), (other_bar, script == LOOP)):
            # A loop reads less than plain whichever way it is asked; what never repeats gains nothing.
            found = row(
                "", lambda s=script: ReplayPipeline(s, vocab_size=300), request_of(script[:14], 100), model, bar=each
            )
            assert (found.ok, found.equal) == (ok, True)


def test_words_are_the_same_ids_in_every_text() -> None:
    words = Words()
    assert words.ids("one two, one") == [0, 1, 2, 3]
    assert words.ids("one two") == [0, 1]
