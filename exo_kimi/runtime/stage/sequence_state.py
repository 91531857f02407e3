"""The sequences that a stage holds caches of, and whether a step follows them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import mlx.core as mx

from exo_kimi.errors import ProtocolError, StageError
from exo_kimi.runtime.stage.caches import Snapshot, trim
from exo_kimi.runtime.stage.drafting import DraftState
from exo_kimi.runtime.stage.sampling import SequenceSampler
from exo_kimi.runtime.steps import Step

Key = TypeVar("Key", bound=Hashable)
State = TypeVar("State", bound="SequenceState")


@dataclass(slots=True)
class SequenceState:
    """One sequence on a stage: its caches, how many tokens they hold, and on the last stage its sampler.

    Args:
        caches: one a layer.
        length: tokens that they hold.
        drafts: so many of the last ones are guesses, until the next segment tells.
        sampler: on the last stage of the runtime.
        total: tokens that were known when it began.
        restoring: True until its first segment, which may start before the end of what came from disk.
        adapter: whose weights its tokens go through; None for the base's.
        draft: as the stage's draft head follows it; None where there is none, or where it does not hold all of it.
        snapshots: its states after some of its tokens, by position, where layers have states.
        moved_from: the name under which another had these caches before, and of how many tokens.
    """

    caches: list[Any]
    length: int = 0
    drafts: int = 0
    sampler: SequenceSampler | None = None
    total: int = 0
    restoring: bool = True
    draft: DraftState | None = None
    snapshots: dict[int, Snapshot] = field(default_factory=dict)
    moved_from: tuple[int, int] | None = None
    adapter: str | None = None

    def end(self) -> None:
        """Stop as a sequence, and hold what is certain, without guesses and what ran ahead, for another to begin from.

        Raises:
            StageError: states that cannot go back so far.
        """
        trim(self.caches, self.length - self.drafts)
        self.length, self.drafts, self.sampler = self.length - self.drafts, 0, None
        self.snapshots.clear()
        if self.draft is not None:
            self.draft.keep(self.length)

    def settle(self, offset: int) -> None:
        """Drop what is beyond `offset`: guesses that were wrong, or that the leader has no use for."""
        excess = self.length - offset
        for cache in self.caches if excess else ():
            if cache.trim(excess) != excess:
                raise StageError(f"a {type(cache).__name__} cannot give back {excess} tokens")
        if self.sampler is not None:
            self.sampler.begin_run(keep=1 + self.drafts - excess)
        if self.draft is not None:
            self.draft.keep(offset)
        self.length, self.drafts = offset, 0

    def begin_at(self, offset: int) -> None:
        """Go on from the first segment's offset: another stage may have read less from its disk than this one."""
        if self.restoring:
            self.go_back(offset)
        self.restoring = False

    def go_back(self, offset: int) -> None:
        """Drop what came from disk beyond `offset`."""
        if offset < self.length:
            trim(self.caches, offset)
            self.length = offset

    @property
    def draft_nbytes(self) -> int:
        """Bytes that the draft head holds of it."""
        return 0 if self.draft is None else self.draft.nbytes


class SequenceTable(dict[Key, State]):
    """Sequences by their keys. With the last one that is dropped, the memory of all goes back to the system."""

    def drop(self, keys: Iterable[Key]) -> None:
        """Free the caches of sequences; keys that are not there are passed over."""
        dropped = [self.pop(key, None) for key in keys]
        if dropped and not self:
            mx.clear_cache()

    def drop_all(self) -> None:
        """Free all caches."""
        self.clear()
        mx.clear_cache()


def check_step(step: Step, sequences: Mapping[int, SequenceState], *, vocab_size: int, stage: int | None) -> None:
    """Check that the segments of a step follow what a stage holds.

    Args:
        step: that came.
        sequences: of the stage, once the step has freed and begun some.
        vocab_size: ids are below it.
        stage: its index, for errors.

    Raises:
        ProtocolError: what contradicts what.
    """
    total = sum(segment.length for segment in step.segments)
    if step.tokens.shape != (total,):
        raise ProtocolError(
            "the tokens of a step do not fill its segments",
            stage=stage,
            expected=f"{total} tokens",
            found=f"shape {step.tokens.shape}",
        )
    if len({segment.seq_id for segment in step.segments}) != len(step.segments):
        raise ProtocolError("a sequence has two segments in one step", stage=stage)
    if total and not 0 <= int(step.tokens.min()) <= int(step.tokens.max()) < vocab_size:
        raise ProtocolError(
            "a token id outside the vocabulary",
            stage=stage,
            expected=f"0 to {vocab_size - 1}",
            found=f"{step.tokens.min()} to {step.tokens.max()}",
        )
    for segment in step.segments:
        entry = sequences.get(segment.seq_id)
        if entry is None or not entry.length - entry.drafts <= segment.offset <= entry.length or segment.length < 1:
            raise ProtocolError(
                f"a segment of sequence {segment.seq_id} does not follow what the stage holds",
                stage=stage,
                expected="a sequence that was begun"
                if entry is None
                else f"offset {entry.length}{f' or up to {entry.drafts} less' * bool(entry.drafts)}, length at least 1",
                found=f"offset {segment.offset}, length {segment.length}",
            )
        masks = len(segment.draft_masks)
        unmasked = segment.mask is not None and masks != segment.drafts
        if segment.drafts and (segment.drafts >= segment.length or not segment.sample or unmasked):
            raise ProtocolError(
                f"drafts of sequence {segment.seq_id} that cannot be checked",
                stage=stage,
                expected="a token before them, `sample`, and with a mask one more for each of them",
                found=f"length {segment.length}, {segment.drafts} drafts, {masks} masks for them",
            )
        if masks not in (0, segment.drafts) or (segment.propose and not segment.sample):
            raise ProtocolError(
                f"a segment of sequence {segment.seq_id} that contradicts itself",
                stage=stage,
                expected=f"no masks for drafts or {segment.drafts}, and guesses only of what follows a sample",
                found=f"{masks} masks, {segment.propose} guesses asked for",
            )
