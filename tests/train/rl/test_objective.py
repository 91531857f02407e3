"""The objective and its gradient against a plain torch implementation, and what clipping, the cap and the KL term do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from exo_kimi.train.model.layers import Floats
from exo_kimi.train.rl.objective import (
    CompletionTokens,
    ObjectiveOptions,
    importance_weights,
    log_probabilities,
    objective,
)

OPTIONS = ObjectiveOptions(
    epsilon=0.2, epsilon_high=0.28, beta=0.05, importance_sampling_correction=True, importance_sampling_clip_max=2.0
)
TOKENS, VOCABULARY = 400, 50
TOLERANCE = 1e-5


def given(seed: int = 0) -> tuple[Floats, Any, CompletionTokens, Floats]:
    """Logits, targets, what is known of them, and old log-probabilities: ratios and weights on both sides of every bound."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((TOKENS, VOCABULARY)).astype(np.float32) * 2
    targets = rng.integers(0, VOCABULARY, TOKENS).astype(np.int32)
    policy = log_probabilities(logits, targets)

    def near(spread: float) -> Floats:
        return (policy + rng.standard_normal(TOKENS) * spread).astype(np.float32)

    old = near(0.3)
    sampler = (old + rng.standard_normal(TOKENS) * 0.6).astype(np.float32)
    known = CompletionTokens(
        mixed=rng.random(TOKENS) < 0.7,
        advantages=rng.standard_normal(TOKENS).astype(np.float32),
        sampler=sampler,
        reference=near(0.5),
    )
    return logits, targets, known, old


def counts(known: CompletionTokens) -> tuple[int, int]:
    return known.policy_tokens, len(known.mixed)


@pytest.mark.parametrize("correction", [True, False])
def test_loss_ratios_and_gradient_are_those_of_torch(correction: bool) -> None:
    torch = pytest.importorskip("torch", reason="torch is the oracle; it is in the extra `test`")
    options = replace(OPTIONS, importance_sampling_correction=correction)
    logits, targets, known, old = given()
    z = torch.tensor(logits, requires_grad=True)
    p = torch.log_softmax(z, -1).gather(1, torch.tensor(targets).long()[:, None])[:, 0]
    before, sampler, reference, a = (
        torch.tensor(each) for each in (old, known.sampler, known.reference, known.advantages)
    )
    mixed = torch.tensor(known.mixed)
    ratio = torch.exp(p - before)
    weight = torch.exp(before - sampler).clamp(max=options.importance_sampling_clip_max)
    weight = weight if correction else torch.ones_like(weight)
    bounded = ratio.clamp(1 - options.epsilon, 1 + options.epsilon_high)
    policy = -weight * torch.minimum(ratio * a, bounded * a)
    kl = torch.exp(reference - p) - (reference - p) - 1
    loss = policy[mixed].mean() + options.beta * kl.mean()
    loss.backward()

    weights, capped = importance_weights(old, known.sampler, options)
    np.testing.assert_allclose(weights, weight.numpy(), atol=TOLERANCE)
    part = objective(logits.copy(), targets, known, old, options, counts=counts(known))
    assert part.sums.loss(options.beta) == pytest.approx(loss.item(), abs=TOLERANCE)
    assert part.sums.kl == pytest.approx(kl.sum().item(), rel=TOLERANCE)
    np.testing.assert_allclose(np.exp(part.log_probabilities - old), ratio.detach().numpy(), rtol=TOLERANCE)
    np.testing.assert_allclose(part.d_logits, z.grad.numpy(), atol=TOLERANCE)
    low, high = (ratio < 1 - options.epsilon) & (a < 0), (ratio > 1 + options.epsilon_high) & (a > 0)
    assert part.sums.clipped == int(((low | high) & mixed).sum())
    assert part.sums.clipped > 20
    assert part.sums.capped == int((capped & known.mixed).sum())
    assert (part.sums.capped > 10) is correction


def test_parts_of_a_batch_add_up_to_it() -> None:
    logits, targets, known, old = given(1)
    whole = objective(logits.copy(), targets, known, old, OPTIONS, counts=counts(known))
    halves = []
    for rows in (slice(0, 150), slice(150, TOKENS)):
        part = CompletionTokens(
            mixed=known.mixed[rows],
            advantages=known.advantages[rows],
            sampler=known.sampler[rows],
            reference=known.reference[rows],
        )
        halves.append(objective(logits[rows].copy(), targets[rows], part, old[rows], OPTIONS, counts=counts(known)))
    np.testing.assert_allclose(np.concatenate([half.d_logits for half in halves]), whole.d_logits, rtol=1e-6)
    assert (halves[0].sums + halves[1].sums).loss(OPTIONS.beta) == pytest.approx(whole.sums.loss(OPTIONS.beta))


def test_in_the_first_update_all_ratios_are_one_and_nothing_is_clipped() -> None:
    logits, targets, known, _ = given(2)
    part = objective(logits.copy(), targets, known, None, OPTIONS, counts=counts(known))
    own = objective(logits.copy(), targets, known, part.log_probabilities, OPTIONS, counts=counts(known))
    assert part.sums == own.sums
    assert part.sums.clipped == 0
    np.testing.assert_array_equal(part.d_logits, own.d_logits)


def test_a_ratio_beyond_its_bound_gives_no_gradient_but_the_way_back_does() -> None:
    logits = np.zeros((4, 3), np.float32)
    targets = np.zeros(4, np.int32)
    policy = log_probabilities(logits, targets)
    shift = np.log(np.array([1.5, 1.5, 0.5, 0.5], np.float32))  # ratios
    known = CompletionTokens(
        mixed=np.ones(4, bool),
        advantages=np.array([1, -1, 1, -1], np.float32),
        sampler=policy - shift,
        reference=policy,
    )
    part = objective(logits.copy(), targets, known, policy - shift, OPTIONS, counts=(4, 4))
    moved = np.abs(part.d_logits).max(-1) > 0
    assert moved.tolist() == [False, True, True, False]
    assert part.sums.clipped == 2


def test_groups_that_teach_nothing_feel_the_kl_term_alone() -> None:
    logits, targets, known, old = given(3)
    none = replace(known, mixed=np.zeros(TOKENS, bool))
    part = objective(logits.copy(), targets, none, old, OPTIONS, counts=counts(none))
    other = replace(none, advantages=-none.advantages)
    again = objective(logits.copy(), targets, other, old, OPTIONS, counts=counts(none))
    assert part.sums.policy_loss == 0
    assert np.abs(part.d_logits).max() > 0
    np.testing.assert_array_equal(part.d_logits, again.d_logits)
    free = replace(OPTIONS, beta=0.0)
    assert not objective(logits.copy(), targets, none, old, free, counts=counts(none)).d_logits.any()


def test_far_log_probabilities_stay_finite() -> None:
    logits, targets, known, old = given(4)
    far = replace(known, sampler=old - 500, reference=known.reference + 500)
    part = objective(logits.copy(), targets, far, old - 500, OPTIONS, counts=counts(known))
    assert np.isfinite(part.d_logits).all()
    assert np.isfinite(part.sums.loss(OPTIONS.beta))
