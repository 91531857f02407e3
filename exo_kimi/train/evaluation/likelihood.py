"""Perplexity on held-out replies, distance to a reference model, and the experts' loads; a layer at a time in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from exo_kimi.compress.compare.intervals import Estimate
from exo_kimi.compress.compare.walks import WalkedTexts, pairs_of, walk_texts
from exo_kimi.compress.layers import LayerWalk
from exo_kimi.compress.texts.encoding import Encoded

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihood:
    """Measures over the counted tokens of some texts.

    Args:
        perplexity: e to the mean loss.
        kl: mean of KL(reference || model) in nats; None without a reference.
        same_choice: share of tokens where both models find the same token likeliest.
        loads: tokens of each expert of each MoE layer.
    """

    perplexity: float
    kl: Estimate | None
    same_choice: Estimate | None
    loads: dict[int, list[int]]


def likelihood(
    walk: LayerWalk, texts: Sequence[Encoded], reference: LayerWalk | None = None, *, say: Say = lambda _: None
) -> Likelihood:
    """Measure a model on texts, without padding, so that loads are those of real tokens.

    Raises:
        UsageError: no text, or a reference with another vocabulary.
        StageOutOfMemoryError: a layer does not fit.
    """
    walked = walk_texts(walk, texts, say=say)
    loads = {layer: counts.tolist() for layer, counts in walked.loads.items()}
    if reference is None:
        return Likelihood(perplexity=_perplexity(walked), kl=None, same_choice=None, loads=loads)
    summary = pairs_of(walk_texts(reference, texts, say=say), walked, texts).summary()
    return Likelihood(perplexity=summary.perplexity, kl=summary.kl, same_choice=summary.same, loads=loads)


def _perplexity(walked: WalkedTexts) -> float:
    losses = [-logs[np.arange(len(targets)), targets] for logs, targets in walked.log_probabilities()]
    return math.exp(float(np.concatenate(losses).mean()))
