"""Two models over the same texts, a layer at a time in memory: how far their next tokens lie apart, and each layer's error.

The error of a layer is that of the second model's layer on the first model's own hidden states: what this layer alone adds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from exo_kimi.compress.compare.tokens import SavedTokens, TokenPairs, bounded_kl, exact_kl, text_of
from exo_kimi.compress.layers import LayerWalk, TokenGroup, attend, groups_of, log_probabilities
from exo_kimi.compress.texts.encoding import Encoded
from exo_kimi.compress.texts.vocabulary import VocabularyPrint
from exo_kimi.errors import UsageError
from exo_kimi.models.kimi_k2 import DecoderLayer, Model
from exo_kimi.models.moe import MoE
from exo_kimi.runtime.stage.resident import give_back_memory

BLOCK_ROWS = 64
"""Places whose logits are held at a time."""

TOP = 256
"""Likeliest tokens of a place that a saved run keeps."""

Say = Callable[[str], None]
Hidden = list[mx.array]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerError:
    """Relative RMS errors of one layer's outputs, and how far the routers agree.

    Args:
        layer: its number in the reference.
        attention, mlp: |theirs - ours| / |ours| over all tokens.
        routing: share of the reference's choices that the subject made too; None where dense, or where experts are other ones.
    """

    layer: int
    attention: float
    mlp: float
    routing: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerOutputs:
    """What a layer made of each group of texts: its inputs, attention's and the MLP's outputs, all (N, D), the chosen experts.

    `error` is what was judged before.
    """

    inputs: Hidden = field(default_factory=list)
    attention: Hidden = field(default_factory=list)
    mlp: Hidden = field(default_factory=list)
    chosen: list[mx.array | None] = field(default_factory=list)
    error: LayerError | None = None


@dataclass(slots=True)
class WalkedTexts:
    """Hidden states on their way through a model, and at the end its head.

    Args:
        walk: the layers.
        groups: the texts.
        hidden: (N, D) of each group.
        loads: layer -> tokens of each expert, where it has any.
    """

    walk: LayerWalk
    groups: Sequence[TokenGroup]
    hidden: Hidden = field(default_factory=list)
    loads: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    head: Model | None = None

    def step(self, layer: int, judge: Callable[[DecoderLayer], LayerError] | None = None) -> LayerOutputs:
        """Run one layer over all texts; `judge` is called with it as soon as it is loaded.

        Returns:
            What it made of each group.
        """
        model = self.walk.load(layer)
        if model.is_first:
            self.hidden = [model.embed(group.ids) for group in self.groups]
        decoder = model.layers[0]
        error = None if judge is None else judge(decoder)
        made = LayerOutputs(error=error)
        for index, group in enumerate(self.groups):
            x = self.hidden[index]
            h = attend(decoder, x, group)
            mlp, chosen = _mlp(decoder, h)
            self.hidden[index] = h + mlp
            mx.eval(self.hidden[index], mlp)
            made.inputs.append(x)
            made.attention.append(h - x)
            made.mlp.append(mlp)
            made.chosen.append(chosen)
            if chosen is not None:
                self._count(layer, chosen)
        if model.is_last:
            model.model.layers = []
            self.head = model
        return made

    def _count(self, layer: int, chosen: mx.array) -> None:
        experts = self.walk.checkpoint.config.routed_experts(layer)
        counts = np.bincount(np.array(chosen).reshape(-1), minlength=experts)
        self.loads[layer] = self.loads.get(layer, np.zeros(experts, np.int64)) + counts

    def log_probabilities(self) -> Iterator[tuple[NDArray[np.float64], NDArray[np.int32]]]:
        """Blocks of (m, vocab) natural logarithms at the counted places, with the (m,) tokens that are there."""
        if self.head is None:
            raise UsageError("no log-probabilities before the last layer")
        for index, group in enumerate(self.groups):
            rows, targets = group.rows, group.targets
            for start in range(0, len(rows), BLOCK_ROWS):
                part = rows[start : start + BLOCK_ROWS]
                logs = log_probabilities(self.head, self.hidden[index][mx.array(part)])
                yield np.array(logs).astype(np.float64), targets[start : start + BLOCK_ROWS]


def _mlp(decoder: DecoderLayer, h: mx.array) -> tuple[mx.array, mx.array | None]:
    """What the MLP adds (N, D), and the chosen experts (N, K)."""
    normed = decoder.post_attention_layernorm(h)
    if not isinstance(decoder.mlp, MoE):
        return decoder.mlp(normed), None
    indices, _ = decoder.mlp.gate(normed)
    return decoder.mlp(normed), indices


def compare_walks(
    reference: LayerWalk, subject: LayerWalk, texts: Sequence[Encoded], *, say: Say = lambda _: None
) -> tuple[TokenPairs, tuple[LayerError, ...]]:
    """Both models on one machine, exactly.

    Args:
        reference: the model to measure against.
        subject: the other; where it has other layers than the reference, its layers are not judged one by one.
        texts: with counted tokens.
        say: called with a line of progress.

    Raises:
        UsageError: other vocabularies, or no text.
        StageOutOfMemoryError: a layer does not fit.
    """
    check_texts(texts, reference, subject)
    for walk in (reference, subject):
        walk.check_room()
    groups = groups_of(texts)
    ours, theirs = WalkedTexts(reference, groups), WalkedTexts(subject, groups)
    errors: list[LayerError] = []
    numbers = reference.numbers
    together = numbers == subject.numbers
    for layer in numbers:
        made = ours.step(layer)
        give_back_memory()
        if together:
            error = theirs.step(layer, partial(layer_error, layer, made, groups)).error
            errors += [] if error is None else [error]
            give_back_memory()
        say(f"layer {layer} of {reference.layers}")
    for layer in () if together else subject.numbers:
        theirs.step(layer)
        give_back_memory()
        say(f"layer {layer} of {subject.layers} of the other model")
    return pairs_of(ours, theirs, texts), tuple(errors)


def layer_error(layer: int, made: LayerOutputs, groups: Sequence[TokenGroup], decoder: DecoderLayer) -> LayerError:
    """How far another layer's outputs lie from what was made, given the same inputs."""
    sums = np.zeros(4)
    same = chosen_count = 0
    comparable = True
    for x, attention, mlp, chosen, group in zip(
        made.inputs, made.attention, made.mlp, made.chosen, groups, strict=True
    ):
        found = attend(decoder, x, group) - x
        other, picked = _mlp(decoder, x + attention)
        sums += [_squares(found - attention), _squares(attention), _squares(other - mlp), _squares(mlp)]
        if chosen is not None and picked is not None:
            same += int((chosen[..., None] == picked[:, None, :]).any(axis=-1).sum())
            chosen_count += chosen.size
        comparable = comparable and (chosen is None) == (picked is None)
    share = same / chosen_count if chosen_count and comparable else None
    return LayerError(
        layer=layer,
        attention=float(np.sqrt(sums[0] / max(sums[1], 1e-30))),
        mlp=float(np.sqrt(sums[2] / max(sums[3], 1e-30))),
        routing=share,
    )


def _squares(values: mx.array) -> float:
    return float(mx.square(values.astype(mx.float32)).sum())


def pairs_of(ours: WalkedTexts, theirs: WalkedTexts, texts: Sequence[Encoded]) -> TokenPairs:
    """Two models that stand at their heads, place by place.

    Raises:
        UsageError: they have other vocabularies.
    """
    check_texts(texts, ours.walk, theirs.walk)
    kl, mine, other, same = [], [], [], []
    for (reference, targets), (subject, _) in zip(ours.log_probabilities(), theirs.log_probabilities(), strict=True):
        rows = np.arange(len(targets))
        kl.append(exact_kl(reference, subject))
        mine.append(-reference[rows, targets])
        other.append(-subject[rows, targets])
        same.append(reference.argmax(-1) == subject.argmax(-1))
    return TokenPairs(
        kl=np.concatenate(kl),
        reference_loss=np.concatenate(mine),
        loss=np.concatenate(other),
        same=np.concatenate(same),
        text_of=text_of(texts),
        domains=tuple(text.domain for text in texts),
    )


def save_walk(
    walk: LayerWalk, texts: Sequence[Encoded], *, name: str, top: int = TOP, say: Say = lambda _: None
) -> SavedTokens:
    """One model's run, to be compared with on another machine.

    Raises:
        UsageError: no text.
        StageOutOfMemoryError: a layer does not fit.
    """
    walked = walk_texts(walk, texts, say=say)
    target, ids, logs = [], [], []
    for found, targets in walked.log_probabilities():
        count = min(top, found.shape[1])
        best = np.argpartition(-found, count - 1, axis=-1)[:, :count]
        values = np.take_along_axis(found, best, axis=-1)
        order = np.argsort(-values, axis=-1, kind="stable")
        ids.append(np.take_along_axis(best, order, axis=-1))
        logs.append(np.take_along_axis(values, order, axis=-1))
        target.append(found[np.arange(len(targets)), targets])
    return SavedTokens(
        name=name,
        texts=tuple(texts),
        target=np.concatenate(target),
        ids=np.concatenate(ids).astype(np.int64),
        logs=np.concatenate(logs),
        vocabulary=VocabularyPrint.of(walk.checkpoint),
    )


def walk_texts(walk: LayerWalk, texts: Sequence[Encoded], *, say: Say = lambda _: None) -> WalkedTexts:
    """One model over texts, to its head.

    Raises:
        UsageError: no text.
        StageOutOfMemoryError: a layer does not fit.
    """
    check_texts(texts, walk)
    walk.check_room()
    walked = WalkedTexts(walk, groups_of(texts))
    for layer in walk.numbers:
        walked.step(layer)
        give_back_memory()
        say(f"layer {layer} of {walk.layers}")
    return walked


def compare_with_saved(saved: SavedTokens, walk: LayerWalk, *, say: Say = lambda _: None) -> TokenPairs:
    """A saved run as the reference: KL over its likeliest tokens and all others together, everything else exact.

    Raises:
        UsageError: it is with another vocabulary.
        StageOutOfMemoryError: a layer does not fit.
    """
    vocab = walk.checkpoint.config.vocab_size
    largest = max(int(saved.ids.max()), *(int(text.ids.max()) for text in saved.texts))
    if largest >= vocab:
        raise UsageError("the saved run has another vocabulary", expected=f"ids under {vocab}", found=largest)
    walked = walk_texts(walk, saved.texts, say=say)
    kl, loss, same, done = [], [], [], 0
    for found, targets in walked.log_probabilities():
        rows = slice(done, done + len(targets))
        done = rows.stop
        kl.append(bounded_kl(saved.logs[rows], np.take_along_axis(found, saved.ids[rows], axis=-1)))
        loss.append(-found[np.arange(len(targets)), targets])
        same.append(found.argmax(-1) == saved.ids[rows, 0])
    return TokenPairs(
        kl=np.concatenate(kl),
        reference_loss=-saved.target,
        loss=np.concatenate(loss),
        same=np.concatenate(same),
        text_of=text_of(saved.texts),
        domains=tuple(text.domain for text in saved.texts),
        bound=True,
    )


def check_texts(texts: Sequence[Encoded], *walks: LayerWalk) -> None:
    """Refuse texts without a counted token, and models of other vocabularies.

    Raises:
        UsageError: what is wrong.
    """
    if not any(text.counted[1:].any() for text in texts):
        raise UsageError("no text to compare on", fix="give --text FILE")
    sizes = {walk.checkpoint.config.vocab_size for walk in walks}
    if len(sizes) > 1:
        raise UsageError("the models have other vocabularies", expected="one vocab_size", found=sorted(sizes))
