"""Speculation without a draft model: guesses from each sequence's own past, sent where their bytes pay, and counted.

The last stage verifies them (`verify`), so they change no token; it knows nothing of stages or links.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from exo_kimi.planner.weights.bytes import ModelBytes
from exo_kimi.runtime.engine.draft_policy import StepBytes, choose_drafts
from exo_kimi.runtime.engine.lookup import Lookup

if TYPE_CHECKING:
    from exo_kimi.runtime.engine.sequence import InFlight, Sequence

Speculate = Literal["off", "auto"] | int
MAX_DRAFTS = 8
"""Guesses of one sequence in a step, by default."""
MAX_STEP_DRAFTS = 64
"""Of all sequences: the last stage holds a row of logits for each, 0.65 MB for K2."""


@dataclass(slots=True, kw_only=True)
class DraftCounts:
    """Totals since the start. Bytes are estimates of what steps that fed generated tokens read, and would have read for the same
    tokens without guesses."""

    drafted: int = 0
    accepted: int = 0
    read_bytes: float = 0.0
    plain_bytes: float = 0.0


@dataclass(slots=True, kw_only=True)
class Drafter:
    """Puts guesses on the sequences of a step.

    Args:
        step_bytes: what steps read.
        limit: guesses of one sequence in a step at most.
        always: send what there is to guess, whatever the bytes say.
    """

    step_bytes: StepBytes
    limit: int = MAX_DRAFTS
    always: bool = False
    counts: DraftCounts = field(default_factory=DraftCounts)

    @classmethod
    def of(cls, speculate: Speculate, model: ModelBytes) -> Drafter | None:
        """What an option asks for: `off`, `auto` where bytes say so, or a number of guesses whatever they say."""
        if speculate in ("off", 0):
            return None
        if isinstance(speculate, int):
            return cls(step_bytes=step_bytes_of(model), limit=speculate, always=True)
        return cls(step_bytes=step_bytes_of(model))

    def draft(self, sequences: Ordered[Sequence], *, others: int, room: int) -> None:
        """Set `drafts` of each sequence.

        Args:
            sequences: that decode together, each with its newest token.
            others: tokens of other sequences in the step.
            room: for guesses, in tokens.
        """
        guesses = [self._guess(sequence) for sequence in sequences]
        room = min(room, MAX_STEP_DRAFTS)
        if room <= 0 or not any(guess for guess, _ in guesses):
            return
        cached = sum(sequence.sent + 1 for sequence in sequences)
        chances = [[1.0] * len(guess) if self.always else chance for guess, chance in guesses]
        counts = choose_drafts(
            chances,
            lambda tokens: 1.0 if self.always else self.step_bytes.read(tokens, cached_tokens=cached),
            others=others,
            room=room,
        )
        for sequence, (guess, _), count in zip(sequences, guesses, counts, strict=True):
            sequence.drafts = tuple(guess[:count])

    def count(self, step: InFlight, *, kept: int) -> None:
        """A step was answered with `kept` tokens; the first token of an answer is prefill's."""
        asked = [part for part in step.parts if part.sample]
        decoding = [part for part in asked if part.end > part.sequence.prompt_tokens]
        if not decoding:
            return
        kept -= len(asked) - len(decoding)
        drafts = sum(part.drafts for part in step.parts)
        read = self.step_bytes.read(step.tokens, cached_tokens=step.cached_tokens)
        plain = self.step_bytes.read(step.tokens - drafts, cached_tokens=step.cached_tokens - drafts)
        self.counts.drafted += drafts
        self.counts.accepted += kept - len(decoding)
        self.counts.read_bytes += read
        self.counts.plain_bytes += plain * kept / len(decoding)

    def _guess(self, sequence: Sequence) -> tuple[list[int], list[float]]:
        lookup = sequence.lookup
        if lookup is None:
            lookup = sequence.lookup = Lookup(sequence.tokens, sequence.prompt_tokens)
        lookup.catch_up()
        # The last token of all is never fed, and under a mask only what the grammar allows may follow.
        limit = min(self.limit, sequence.max_new_tokens - sequence.generated_tokens - 1)
        if limit <= 0 or sequence.mask is not None:
            return [], []
        guess = lookup.guess(limit)
        return guess, lookup.chances(len(guess))


def step_bytes_of(model: ModelBytes) -> StepBytes:
    """What steps of a model read."""
    return StepBytes(
        shared_bytes=sum(model.layer_bytes) - sum(model.expert_bytes) + model.head_bytes,
        expert_bytes=sum(model.expert_bytes),
        experts=model.config.n_routed_experts,
        experts_per_token=model.config.num_experts_per_tok,
        kv_token_bytes=model.kv_layer_bytes * model.layers,
    )
