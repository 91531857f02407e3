"""What a draft head learns from a text: the target's features of every row, and the target's own next tokens as far as they are
the assistant's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from exo_kimi.arch.config import KimiConfig
from exo_kimi.compress.texts.encoding import Encoded
from exo_kimi.train.data.batches import lay_out
from exo_kimi.train.draft.rollout import RolloutBatch, Rows
from exo_kimi.train.model.forward import Batch, features_and_logits
from exo_kimi.train.model.layers import Floats, Parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetModel:
    """The model that a head is for, in NumPy.

    Args:
        parameters: float32, by the names of `models.kimi_k2.Model`.
        config: its architecture.
        wavelengths: (rope / 2,) of its rotary embedding.
        layers: whose inputs are the features.
    """

    parameters: Parameters
    config: KimiConfig
    wavelengths: Floats
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftLesson:
    """A rollout and what the target says of its guesses.

    Args:
        rollout: of the head.
        teacher: (T, vocab) logits of the target, of every row whose next token is the assistant's.
        lines: of each step, which line of `teacher` is for each judged row.
    """

    rollout: RolloutBatch
    teacher: Floats
    lines: Sequence[Rows]


def make_lesson(texts: Sequence[Encoded], target: TargetModel, *, steps: int) -> DraftLesson:
    """Run the target over texts, and lay out a head's rollout of some steps over them.

    A guess is judged where the token that it is for is the assistant's.
    """
    laid = lay_out(texts)
    count = len(laid.inputs)
    taught = np.flatnonzero(laid.counted_next)  # the target's rows whose next token is the assistant's
    batch = Batch(
        inputs=laid.inputs,
        spans=laid.spans,
        rows=taught,
        targets=np.zeros(len(taught), np.int32),
        padding=laid.padding,
    )
    features, teacher = features_and_logits(target.parameters, target.config, target.wavelengths, batch, target.layers)
    embedding = target.parameters["model.embed_tokens.weight"]
    embeddings, judged, lines = [], list[Rows](), list[Rows]()
    for step in range(steps):
        # Row s of this step is fed the token at s + 1 + step, and guesses the one after it, as the target does from there.
        ahead = np.arange(count) + 1 + step
        inside = ahead < laid.ends
        fed = np.zeros((count, embedding.shape[1]), np.float32)
        fed[inside] = embedding[laid.inputs[ahead[inside]]]
        embeddings.append(fed)
        rows = taught - 1 - step
        kept = rows >= laid.starts[taught]
        judged.append(rows[kept])
        lines.append(np.flatnonzero(kept))
    going = np.unique(np.concatenate(judged[1:])) if steps > 1 else np.zeros(0, np.intp)
    places = [judged[0], *(np.searchsorted(going, rows) for rows in judged[1:])]
    rolled = RolloutBatch(spans=laid.spans, features=features, embeddings=embeddings, going=going, judged=places)
    return DraftLesson(rollout=rolled, teacher=teacher, lines=lines)


def softmax(logits: Floats) -> Floats:
    """Probabilities over the last axis."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    shares: Floats = np.divide(shifted, shifted.sum(-1, keepdims=True), dtype=np.float32)
    return shares
