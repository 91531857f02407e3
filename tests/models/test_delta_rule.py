"""The gated delta rule: its forms agree, also where decay is strong."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from exo_kimi.models.kda.delta_rule import CHUNK, DeltaInputs, chunked, delta_rule, recurrent

HEADS, KEYS, VALUES = 3, 32, 16


def inputs(tokens: int, *, decay: float, batch: int = 2) -> tuple[DeltaInputs, mx.array]:
    """Random tokens whose gates sum to about -decay over a chunk, and a state before them."""
    keys = iter(mx.random.split(mx.random.key(tokens), 6))
    shape = batch, tokens, HEADS, KEYS
    q, k = (mx.random.normal(shape, key=next(keys)) for _ in range(2))
    k = k / mx.linalg.norm(k, axis=-1, keepdims=True)
    v = mx.random.normal((batch, tokens, HEADS, VALUES), key=next(keys))
    g = -decay / CHUNK * 2 * mx.random.uniform(shape=shape, key=next(keys))
    beta = mx.random.uniform(shape=shape[:3], key=next(keys))
    state = mx.random.normal((batch, HEADS, VALUES, KEYS), key=next(keys))
    return DeltaInputs(q, k, v, g, beta), state


@pytest.mark.parametrize("decay", [0.0, 1.0, 160.0, 3_000.0])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 64, 100])
def test_chunks_give_what_the_recurrence_does(tokens: int, decay: float) -> None:
    rows, state = inputs(tokens, decay=decay)
    (found, after), (expected, last) = chunked(rows, state), recurrent(rows, state)
    assert bool(mx.isfinite(found).all()) and bool(mx.isfinite(after).all())
    for one, other in ((found, expected), (after, last)):
        assert one.shape == other.shape
        np.testing.assert_allclose(np.array(one), np.array(other), atol=2e-5 * np.abs(np.array(other)).max() + 1e-6)


def test_keys_that_repeat_keep_their_digits() -> None:
    """The worst case for the triangular solve: every token of a chunk overwrites what the one before wrote."""
    rows, state = inputs(64, decay=0.0)
    same = mx.broadcast_to(rows.k[:, :1], rows.k.shape)
    rows = DeltaInputs(rows.q, same, rows.v, rows.g, mx.ones_like(rows.beta))
    (found, _), (expected, _) = chunked(rows, state), recurrent(rows, state)
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=1e-4)


def test_a_cut_anywhere_changes_no_bit_of_the_recurrence() -> None:
    rows, state = inputs(40, decay=2.0)
    whole, last = recurrent(rows, state)
    for cut in (1, 2, 3, 16, 39):
        parts = [
            DeltaInputs(*(getattr(rows, name)[:, part] for name in ("q", "k", "v", "g", "beta")))
            for part in (slice(cut), slice(cut, None))
        ]
        first, middle = recurrent(parts[0], state)
        second, after = recurrent(parts[1], middle)
        assert mx.array_equal(mx.concatenate([first, second], axis=1), whole) and mx.array_equal(after, last)


def test_the_rule_of_this_device_is_the_recurrence() -> None:
    rows, state = inputs(50, decay=1.0)
    np.testing.assert_allclose(np.array(delta_rule(rows, state)[0]), np.array(recurrent(rows, state)[0]), atol=1e-4)


def test_the_state_and_outputs_are_those_of_mlx_lm() -> None:
    from mlx_lm.models.gated_delta import gated_delta_ops

    rows, state = inputs(40, decay=1.0)
    expected, last = gated_delta_ops(rows.q, rows.k, rows.v, mx.exp(rows.g), rows.beta, state)
    found, after = recurrent(rows, state)
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=2e-5)
    np.testing.assert_allclose(np.array(after), np.array(last), atol=2e-5)
