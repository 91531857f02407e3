"""Muon and AdamW against mlx.optimizers."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.optimizers
import numpy as np
import pytest

from exo_kimi.train.optimizers import Optimizer, clip, orthogonal

RATE = 0.01


def _steps(count: int, shape: tuple[int, ...]) -> tuple[np.ndarray, list[np.ndarray]]:
    rng = np.random.default_rng(0)
    first = rng.standard_normal(shape, dtype=np.float32)
    return first, [rng.standard_normal(shape, dtype=np.float32) for _ in range(count)]


def test_adamw_is_mlx_adamw() -> None:
    value, gradients = _steps(3, (6, 4))
    theirs = mlx.optimizers.AdamW(RATE, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1, bias_correction=True)
    expected = {"w": mx.array(value)}
    for gradient in gradients:
        expected = theirs.apply_gradients({"w": mx.array(gradient)}, expected)
    ours = Optimizer({"w": value}, is_matrix=lambda _: False, decays=lambda _: True, weight_decay=0.1)
    for step, gradient in enumerate(gradients, start=1):
        ours.update({"w": gradient}, rate=RATE, step=step)
    np.testing.assert_allclose(value, np.array(expected["w"]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_muon_moves_where_mlx_muon_moves(shape: tuple[int, int]) -> None:
    """The scale is ours (Kimi's, to AdamW's size); the direction is the same to the rounding of the iteration."""
    value, gradients = _steps(1, shape)
    theirs = mlx.optimizers.Muon(RATE, momentum=0.95, weight_decay=0.0)
    moved = theirs.apply_gradients({"w": mx.array(gradients[0])}, {"w": mx.array(value)})
    direction = np.array(moved["w"]) - value
    before = value.copy()
    ours = Optimizer({"w": value}, is_matrix=lambda _: True, decays=lambda _: False, weight_decay=0.0)
    ours.update({"w": gradients[0].copy()}, rate=RATE, step=1)
    change = value - before
    cosine = (direction * change).sum() / (np.linalg.norm(direction) * np.linalg.norm(change))
    assert cosine > 0.999
    assert np.sqrt((change**2).mean()) == pytest.approx(0.2 * RATE, rel=0.25)


def test_every_expert_is_a_matrix_of_its_own() -> None:
    _, (stack,) = _steps(1, (3, 8, 5))
    together = orthogonal(stack)
    for index in range(3):
        np.testing.assert_allclose(together[index], orthogonal(stack[index]), rtol=1e-4, atol=1e-5)
    singular = np.linalg.svd(together, compute_uv=False)
    assert singular.min() > 0.5
    assert singular.max() < 1.5


def test_clipping_keeps_the_direction() -> None:
    gradients = {"a": np.full(4, 3.0, np.float32), "b": np.full(4, 4.0, np.float32)}
    assert clip(gradients, 1.0) == pytest.approx(10.0)
    assert math.sqrt(sum(float((value**2).sum()) for value in gradients.values())) == pytest.approx(1.0, rel=1e-6)
    assert clip(gradients, 2.0) == pytest.approx(1.0, rel=1e-6)
    assert gradients["b"][0] / gradients["a"][0] == pytest.approx(4 / 3)
