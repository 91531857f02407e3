"""One decode step ahead of the leader, on a stage that is the whole model: begun when an answer is out, before the next is asked.

The stage has chosen the tokens itself, so it knows what the leader will ask; while the answer travels, is turned into text and
the next step is made, MLX computes already. Choosing is not done ahead: penalties, masks and random numbers are as without it.
What the leader then does not ask for is dropped, so no token changes. It takes no cache memory that the leader has not reserved:
where a cache would have to grow, nothing runs ahead.

mlx-lm enqueues a step before it reads the token of the one before. Measured here that is slower: MLX lets ten tasks wait, so
enqueueing a step takes about as long as computing it, and every token would be answered a step late.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from exo_kimi.runtime.stage.caches import room, trim
from exo_kimi.runtime.stage.sequence_state import SequenceState
from exo_kimi.runtime.stage.stage_model import AdaptedModels, StageModel
from exo_kimi.runtime.steps import Segment, Step, StepResult

MOST_SEQUENCES = 64
"""A row of logits is held for each, as for guesses (`speculation.MAX_STEP_DRAFTS`)."""
LONGEST_PAUSE = 64
"""Steps without running ahead after it was in vain again and again."""


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """What was computed ahead for some segments of a step: `rows` of `logits` (n, vocab) by sequence, and of `features`, where a
    draft head reads them."""

    logits: mx.array
    rows: Mapping[int, int]
    features: mx.array | None = None

    def rest(self, step: Step) -> Step:
        """The step without those segments."""
        starts = np.cumsum([0, *(segment.length for segment in step.segments)])
        kept = [i for i, segment in enumerate(step.segments) if segment.seq_id not in self.rows]
        tokens = [step.tokens[starts[i] : starts[i + 1]] for i in kept]
        return replace(
            step,
            segments=tuple(step.segments[i] for i in kept),
            tokens=np.concatenate([np.zeros(0, np.int32), *tokens]),
        )

    def joined(self, step: Step, others: mx.array | None) -> mx.array:
        """The logits that a step asks for, in its order; `others` are those of the rest of it."""
        parts, taken = list[mx.array](), 0
        rows = [self.rows.get(segment.seq_id) for segment in step.segments]
        if rows == list(range(len(self.logits))):
            return self.logits
        for segment, row in zip(step.segments, rows, strict=True):
            if row is not None:
                parts.append(self.logits[row : row + 1])
            elif segment.sample and others is not None:
                count = 1 + segment.drafts
                parts.append(others[taken : taken + count])
                taken += count
        return mx.concatenate(parts)

    def joined_features(self, step: Step, others: mx.array | None) -> mx.array | None:
        """The features of all tokens of a step, in its order; `others` are those of the rest of it."""
        if self.features is None:
            return None
        parts, taken = list[mx.array](), 0
        for segment in step.segments:
            row = self.rows.get(segment.seq_id)
            if row is not None:
                parts.append(self.features[row : row + 1])
            elif others is not None:
                parts.append(others[taken : taken + segment.length])
                taken += segment.length
        return mx.concatenate(parts)


class Ahead:
    """What one stage has enqueued.

    Args:
        model: of the stage; one that is not the whole model never runs ahead.
        models: the same with the adapters that it holds.
        enabled: False is the oracle: every step is computed when it is asked for.
        feature_layers: whose features a draft head reads.
    """

    def __init__(
        self,
        model: StageModel,
        models: AdaptedModels,
        *,
        enabled: bool = True,
        feature_layers: Sequence[int] = (),
    ) -> None:
        self._model, self._models = model, models
        self._feature_layers = tuple(feature_layers)
        self._enabled = enabled and model.is_first and model.is_last
        self._enqueued: tuple[Mapping[int, tuple[int, int]], mx.array, mx.array | None] | None = None
        """By sequence its row of the logits and the token fed; the logits; the features."""
        self._misses = self._pause = 0
        self.used = self.dropped = 0

    def forget(self) -> None:
        """Every sequence was dropped, or ended as the leader knows it."""
        self._enqueued = None

    def settle(self, step: Step, sequences: Mapping[int, SequenceState]) -> PreparedStep | None:
        """What of a step is computed already; all other caches are as the leader knows them.

        Args:
            step: that came.
            sequences: every sequence of the stage, before the step frees or begins any.
        """
        if self._enqueued is None:
            return None
        (rows, logits, features), self._enqueued = self._enqueued, None
        tokens = step.tokens.tolist()
        fresh = {*step.free, *(start.seq_id for start in step.begin)}
        found: dict[int, int] = {}
        missed, start = False, 0
        for segment in step.segments:
            entry = sequences.get(segment.seq_id)
            given = tokens[start : start + segment.length]
            start += segment.length
            if segment.seq_id not in rows or entry is None or segment.seq_id in fresh:
                continue
            row, token = rows[segment.seq_id]
            if given == [token] and segment.sample and segment.offset == entry.length:
                found[segment.seq_id] = row
            else:
                missed = True
        for seq_id in rows:
            if seq_id not in found and seq_id in sequences:
                trim(sequences[seq_id].caches, sequences[seq_id].length)
        self.used += len(found)
        self.dropped += len(rows) - len(found)
        self._misses = self._misses + 1 if missed else 0
        self._pause = min(2 ** min(self._misses, 6), LONGEST_PAUSE) if missed else 0
        return PreparedStep(logits, found, features) if found else None

    def enqueue(self, step: Step, result: StepResult, sequences: Mapping[int, SequenceState]) -> None:
        """Begin with what will follow a step that was answered.

        Args:
            step: all of it.
            result: its answer.
            sequences: every sequence of the stage.
        """
        entries = [sequences[segment.seq_id] for segment in step.segments]
        if (
            not self._enabled
            or not 0 < len(entries) <= MOST_SEQUENCES
            or not all(map(_goes_on, step.segments, entries))
        ):
            return
        if self._pause:
            self._pause -= 1
            return
        tokens = [sampled.token_id for sampled in result.sampled]
        segments = [(1, entry.caches) for entry in entries]
        hidden, features = self._models.forward(
            mx.array(tokens, mx.int32),
            segments,
            [entry.adapter for entry in entries],
            feature_layers=self._feature_layers,
        )
        logits = self._model.logits(hidden).astype(mx.float32)
        mx.async_eval(logits, [] if features is None else features)  # type: ignore[no-untyped-call]
        rows = {segment.seq_id: (row, tokens[row]) for row, segment in enumerate(step.segments)}
        self._enqueued = rows, logits, features


def _goes_on(segment: Segment, sequence: SequenceState) -> bool:
    """It has one new token, which its caches have room for, and no guesses follow it."""
    return segment.sample and not segment.drafts and not segment.propose and room(sequence.caches) > 0
