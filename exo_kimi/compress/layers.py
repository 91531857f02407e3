"""A forward pass over many texts with one decoder layer in memory at a time.

Every layer is loaded, run over the hidden states of all texts, and let go. Beside the layer (the embedding counts to the first,
the head to the last) the hidden states are held: N tokens of `hidden_size` activations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.compress.texts.encoding import Encoded
from exo_kimi.errors import StageOutOfMemoryError
from exo_kimi.models.blocks import Span
from exo_kimi.models.kimi_k2 import DecoderLayer, Model
from exo_kimi.runtime.loading.loader import load_stage
from exo_kimi.runtime.stage.memory import free_memory
from exo_kimi.units import format_bytes

GROUP_TOKENS = 2048
"""Tokens of one pass through a layer: enough that each expert's weights are read once for many."""

Change = Callable[[int, DecoderLayer], None]


@dataclass(frozen=True, slots=True)
class TokenGroup:
    """Whole texts laid end to end, N tokens in all.

    Args:
        texts: them.
        ids: (N,) int32.
        positions: (N,) int32, from 0 in each text.
        spans: one per text.
    """

    texts: tuple[Encoded, ...]
    ids: mx.array
    positions: mx.array
    spans: tuple[Span, ...]

    @classmethod
    def of(cls, texts: Sequence[Encoded]) -> TokenGroup:
        """The group of some texts."""
        lengths = [len(text.ids) for text in texts]
        positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
        spans = tuple(Span(1, length, "causal" if length > 1 else None) for length in lengths)
        return cls(tuple(texts), mx.array(np.concatenate([text.ids for text in texts])), mx.array(positions), spans)

    @property
    def rows(self) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
        """(M,) the rows before counted tokens: where the loss is taken."""
        return self._places()[0]

    @property
    def targets(self) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """(M,) the counted token that follows each of `rows`."""
        return self._places()[1]

    def _places(self) -> tuple[np.ndarray[tuple[int], np.dtype[np.intp]], np.ndarray[tuple[int], np.dtype[np.int32]]]:
        rows, targets, offset = [], [], 0
        for text in self.texts:
            places = np.flatnonzero(text.counted[1:])
            rows.append(offset + places)
            targets.append(text.ids[1:][places])
            offset += len(text.ids)
        return np.concatenate(rows), np.concatenate(targets)


def groups_of(texts: Sequence[Encoded], most_tokens: int = GROUP_TOKENS) -> list[TokenGroup]:
    """Cut texts into groups of at most `most_tokens`, in their order; a longer text is a group of its own."""
    groups: list[TokenGroup] = []
    waiting: list[Encoded] = []
    for text in texts:
        if waiting and sum(len(each.ids) for each in waiting) + len(text.ids) > most_tokens:
            groups.append(TokenGroup.of(waiting))
            waiting = []
        waiting.append(text)
    return [*groups, TokenGroup.of(waiting)] if waiting else groups


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWalk:
    """The layers of a checkpoint, one after the other.

    Args:
        checkpoint: it.
        dtype: of activations; None keeps what is stored.
        change: called with each loaded layer's number and the layer, before it is run: the mask of a pruning plan.
        skipped: layers that are left out, as a plan drops them; never the first or the last.
    """

    checkpoint: Checkpoint
    dtype: str | None = None
    change: Change | None = None
    skipped: tuple[int, ...] = ()

    @property
    def layers(self) -> int:
        """How many there are."""
        return self.checkpoint.config.num_hidden_layers

    @property
    def numbers(self) -> tuple[int, ...]:
        """The layers that are run, in order."""
        return tuple(layer for layer in range(self.layers) if layer not in self.skipped)

    @property
    def largest_bytes(self) -> int:
        """Bytes of the largest layer as it is held, with embedding or head where those come with it."""
        return max(self.checkpoint.manifest(at, at + 1).resident_bytes for at in range(self.layers))

    def check_room(self) -> None:
        """Refuse to begin where the largest layer does not fit.

        Raises:
            StageOutOfMemoryError: it does not.
        """
        free_bytes = free_memory().free_bytes
        if self.largest_bytes > free_bytes:
            raise StageOutOfMemoryError(
                "one layer does not fit into this machine's memory now",
                expected=f"at most {format_bytes(free_bytes)}",
                found=format_bytes(self.largest_bytes),
                where=self.checkpoint.directory,
                fix="close other programs, or convert the checkpoint to fewer bits first",
            )

    def load(self, layer: int) -> Model:
        """One layer as a model of it alone, the first with the embedding, the last with norm and head."""
        model = load_stage(self.checkpoint.manifest(layer, layer + 1), dtype=self.dtype)
        if self.change is not None:
            self.change(layer, model.layers[0])
        return model


def attend(decoder: DecoderLayer, x: mx.array, group: TokenGroup) -> mx.array:
    """(N, D) after attention: x + attention(norm(x)) of every text by itself."""
    caches = [None] * len(group.spans)
    out: mx.array = x + decoder.self_attn(decoder.input_layernorm(x), group.positions, list(group.spans), caches)
    return out


def log_probabilities(model: Model, hidden: mx.array) -> mx.array:
    """(M, vocab) float32 natural logarithms of next-token probabilities, from (M, D) after the last layer."""
    logits = model.logits(hidden)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
