"""Measures of next tokens: exact KL, its bound from few tokens, intervals that cover, and files that are read strictly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exo_kimi.compress.compare.intervals import mean_of_texts
from exo_kimi.compress.compare.replies import LOOP_TURNS, ends_in_loop
from exo_kimi.compress.compare.tokens import SavedTokens, bounded_kl, exact_kl, pair_saved
from exo_kimi.compress.texts.encoding import Encoded
from exo_kimi.errors import UsageError


def _logs(seed: int, rows: int = 6, vocab: int = 40) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    logits = 3 * np.random.default_rng(seed).standard_normal((rows, vocab))
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@given(st.integers(0, 500), st.integers(1, 40))
def test_few_tokens_give_a_lower_bound_and_all_the_value(seed: int, top: int) -> None:
    p, q = _logs(seed), _logs(seed + 1000)
    best = np.argsort(-p, axis=-1)[:, :top]
    bound = bounded_kl(np.take_along_axis(p, best, -1), np.take_along_axis(q, best, -1))
    exact = exact_kl(p, q)
    assert (bound <= exact + 1e-5).all()
    if top == p.shape[1]:
        np.testing.assert_allclose(bound, exact, atol=1e-5)


def test_a_model_is_no_distance_from_itself() -> None:
    p = _logs(1)
    np.testing.assert_allclose(exact_kl(p, p), 0)
    np.testing.assert_allclose(bounded_kl(p[:, :5], p[:, :5]), 0, atol=1e-9)


def _text(length: int, domain: str, first: int = 0) -> Encoded:
    return Encoded(ids=np.arange(first, first + length, dtype=np.int32), counted=np.arange(length) > 0, domain=domain)


def _saved(logs: np.ndarray[tuple[int, ...], np.dtype[np.float64]], top: int, first: int = 0) -> SavedTokens:
    ids = np.argsort(-logs, axis=-1)[:, :top]
    return SavedTokens(
        name="one",
        texts=(_text(5, "a", first), _text(len(logs) - 3, "b")),
        target=logs[:, 3],
        ids=ids,
        logs=np.take_along_axis(logs, ids, -1),
    )


def test_saved_runs_pair_by_token_ids(tmp_path: Path) -> None:
    p, q = _logs(1), _logs(2)
    for name, logs in (("p", p), ("q", q)):
        _saved(logs, 40).save(tmp_path / name)
    pairs = pair_saved(SavedTokens.read(tmp_path / "p"), SavedTokens.read(tmp_path / "q"))
    np.testing.assert_allclose(pairs.kl, exact_kl(p, q), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(pairs.same, p.argmax(-1) == q.argmax(-1))
    np.testing.assert_allclose(pairs.loss, -q[:, 3], rtol=1e-6)
    few = pair_saved(_saved(p, 5), _saved(q, 5))
    assert few.bound
    assert (few.kl <= exact_kl(p, q) + 1e-5).all()
    assert len(pairs.of_domain("b").kl) == 2
    with pytest.raises(UsageError, match="other texts"):
        pair_saved(_saved(p, 5), _saved(q, 5, first=1))


@pytest.mark.parametrize("content", [b"", b"nothing", b"PK\x03\x04"])
def test_a_file_that_is_no_run_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "run").write_bytes(content)
    with pytest.raises(UsageError):
        SavedTokens.read(tmp_path / "run")


def test_intervals_cover_the_mean_nineteen_times_of_twenty() -> None:
    """Texts of different means: taking tokens for independent would cover far less."""
    hits = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        means = rng.standard_normal(40)
        text_of = np.repeat(np.arange(40), 25)
        estimate = mean_of_texts(means[text_of] + 0.1 * rng.standard_normal(1000), text_of, seed=seed)
        hits += estimate.low <= 0 <= estimate.high
    assert 88 <= hits <= 99


@given(st.lists(st.integers(0, 3), max_size=20), st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(4, 9))
def test_a_repeated_end_is_a_loop(start: list[int], piece: list[int], turns: int) -> None:
    reply = start + piece * max(turns, -(-24 // len(piece)) + 1)
    assert ends_in_loop(reply)


@pytest.mark.parametrize(
    "reply", [[], [1], list(range(200)), [1, 2] * (LOOP_TURNS - 1), [7] * 12, [*[1] * 60, *range(9)]]
)
def test_what_ends_otherwise_is_none(reply: list[int]) -> None:
    assert not ends_in_loop(reply)
