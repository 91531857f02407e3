"""The steps of one stage: tokens or hidden states in, hidden states or token ids out."""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from exo_kimi.errors import (
    ExpertReadError,
    ProtocolError,
    RuntimeFault,
    StageError,
    StageOutOfMemoryError,
    machine_error,
)
from exo_kimi.runtime.stage.caches import (
    Snapshot,
    capacity_for,
    copy_prefix,
    least_length,
    snapshot_nbytes,
    take_snapshot,
    trim,
)
from exo_kimi.runtime.stage.drafting import DraftRunner, DraftState
from exo_kimi.runtime.stage.lookahead import Ahead, PreparedStep
from exo_kimi.runtime.stage.memory import is_out_of_memory
from exo_kimi.runtime.stage.pictures import PictureTower, without_pictures
from exo_kimi.runtime.stage.prefix_disk import PrefixDisk, read_blocks, write_blocks
from exo_kimi.runtime.stage.sampling import SequenceSampler, sample_runs
from exo_kimi.runtime.stage.sequence_state import SequenceState, SequenceTable, check_step
from exo_kimi.runtime.stage.stage_model import AdaptedModels, StageModel, pack, unpack, width_of
from exo_kimi.runtime.steps import (
    Blocks,
    FailedSequence,
    HeldCaches,
    Proposal,
    Sampled,
    Segment,
    SequenceStart,
    Step,
    StepResult,
)

logger = logging.getLogger(__name__)


class StageWorker:
    """Runs the steps of one stage, in order, on the thread that loaded the model.

    Args:
        model: this stage's layers.
        epoch: steps of any other epoch are refused.
        stage: index of the stage, for errors.
        disk: where it keeps prefixes; may be set later.
        tower: for pictures, on the first stage; None takes none.
        ahead: whether `run_ahead` does anything on a stage that is the whole model.
        feature_layers: whose features a draft head on the last stage reads, ascending; empty without one.
        drafts: that head, on the last stage.
        adapted: these layers with adapters, by the names by which sequences ask for them.

    Attributes:
        asks_all: take all tokens of a prompt through the whole last layer, for somebody who looks at what it does with them.
    """

    def __init__(
        self,
        model: StageModel,
        *,
        epoch: int,
        stage: int | None = None,
        disk: PrefixDisk | None = None,
        tower: PictureTower | None = None,
        ahead: bool = True,
        feature_layers: Sequence[int] = (),
        drafts: DraftRunner | None = None,
        adapted: Mapping[str, StageModel] | None = None,
    ) -> None:
        self.model = model
        self.models = AdaptedModels(model, adapted)
        self.feature_layers = tuple(feature_layers)
        self.drafts = drafts
        self.epoch = epoch
        self.stage = stage
        self.disk = disk
        self.tower = tower
        self.ahead = Ahead(model, self.models, enabled=ahead, feature_layers=feature_layers)
        self.asks_all = False
        self._sequences: SequenceTable[int, SequenceState] = SequenceTable()
        self._failed: dict[int, FailedSequence] = {}
        self._answered: tuple[Step, StepResult] | None = None
        self._is_whole = True
        """Whether no work was broken off that may have left caches half written."""

    @property
    def sequences(self) -> int:
        """How many sequences are registered."""
        return len(self._sequences)

    @property
    def kv_nbytes(self) -> int:
        """Bytes that the caches hold, and snapshots of them."""
        once = {id(sequence): sequence for sequence in self._sequences.values()}  # one may have two names after `keep`
        snapshots = [each for sequence in once.values() for each in sequence.snapshots.values()]
        return snapshot_nbytes((sequence.caches for sequence in once.values()), snapshots) + sum(
            self.model.cache_nbytes(sequence.caches) + sequence.draft_nbytes for sequence in once.values()
        )

    def reset(self, epoch: int) -> None:
        """Drop every sequence and go on in `epoch`."""
        self.ahead.forget()
        self._answered = None
        self._sequences.drop_all()
        self._failed.clear()
        self._is_whole = True
        self.epoch = epoch

    def keep(self, epoch: int) -> tuple[HeldCaches, ...]:
        """End every sequence and go on in `epoch`, with what is whole of their caches for others to begin from.

        Where work was broken off, everything is dropped: layers may differ in what they hold, and what MLX enqueued may fail yet.

        Returns:
            What is held. Caches that were moved have both names, since a stage behind this one may not have heard of the newer.
        """
        if not self._is_whole:
            self.reset(epoch)
            return ()
        self.ahead.forget()
        self._answered = None
        self.epoch = epoch
        self._sequences.drop(self._failed)
        self._failed.clear()
        held: dict[int, HeldCaches] = {}
        for seq_id, sequence in list(self._sequences.items()):
            try:
                sequence.end()
            except StageError as error:
                logger.warning("the caches of sequence %d are dropped: %s", seq_id, error)
                self._sequences.drop([seq_id])
                continue
            least = least_length(sequence.caches)
            before, tokens = sequence.moved_from or (seq_id, sequence.length)
            for name, count in ((seq_id, sequence.length), (before, min(tokens, sequence.length))):
                self._sequences[name] = sequence
                held[name] = HeldCaches(seq_id=name, tokens=count, least_tokens=least)
        mx.clear_cache()
        return tuple(held.values())

    def execute(self, step: Step) -> Step | StepResult:
        """Carry out a step; what it asks for is evaluated when it returns.

        Returns:
            The step with this stage's hidden states (None when it has no segments), or the last stage's StepResult.

        Raises:
            ProtocolError: a step that contradicts what this stage holds.
            StageError: logits that are not finite.
            StageOutOfMemoryError: MLX could not allocate.
        """
        if step.epoch != self.epoch:
            raise ProtocolError("a step of another epoch", stage=self.stage, expected=self.epoch, found=step.epoch)
        self._is_whole = False
        try:
            prepared = self.ahead.settle(step, self._sequences)
            # An id that is not there was never begun: its sequence ended before its first segment.
            self._sequences.drop(step.free)
            for seq_id in step.free:
                self._failed.pop(seq_id, None)
            self._failed = {one.seq_id: one for one in step.failed} | self._failed
            for start in step.begin:
                self._begin(start)
            for seq_id, position in step.forget:
                if (holder := self._sequences.get(seq_id)) is not None:
                    holder.snapshots.pop(position, None)
            step = self._without_failed(self._restore(step))
            result = self._work(step, prepared)
            for blocks in step.store:
                self._store(blocks)
            self._answered = (step, result) if isinstance(result, StepResult) else None
            self._is_whole = True
            return result
        except RuntimeFault as fault:
            fault.stage = self.stage if fault.stage is None else fault.stage
            raise
        except (RuntimeError, ValueError, MemoryError) as error:  # what MLX raises
            raise as_fault(error, stage=self.stage) from error

    def run_ahead(self) -> None:
        """Begin with what will follow the last answer, if that is known; to be called once it is on its way.

        Raises:
            StageError, StageOutOfMemoryError, machine_error: as of `execute`.
        """
        answered, self._answered = self._answered, None
        if answered is not None:
            self._is_whole = False
            try:
                self.ahead.enqueue(*answered, self._sequences)
                self._is_whole = True
            except (RuntimeError, ValueError, MemoryError) as error:
                raise as_fault(error, stage=self.stage) from error

    def _work(self, step: Step, prepared: PreparedStep | None) -> Step | StepResult:
        if not step.segments:
            return self._answer(step, ()) if self.model.is_last else replace(step, hidden=None)
        for segment in step.segments:
            if segment.seq_id in self._sequences:
                self._sequences[segment.seq_id].begin_at(segment.offset)
        check_step(step, self._sequences, vocab_size=self.model.args.vocab_size, stage=self.stage)
        return self._run(step, prepared)

    def _store(self, blocks: Blocks) -> None:
        if blocks.seq_id not in self._failed:
            write_blocks(self.disk, self._known(blocks.seq_id), blocks, drafts=self.drafts)
        elif self.disk is not None:
            self.disk.refuse(blocks.all_keys)

    def _without_failed(self, step: Step) -> Step:
        """The step without what comes for sequences that failed before, on this stage or one before it."""
        failed = {one.seq_id: one for one in step.failed}
        for segment in step.segments:
            if segment.seq_id in self._failed:
                failed[segment.seq_id] = self._failed[segment.seq_id]
        if not failed:
            return step
        return replace(_rest_of(step, failed), failed=tuple(failed.values()))

    def _known(self, seq_id: int) -> SequenceState:
        sequence = self._sequences.get(seq_id)
        if sequence is None:
            raise ProtocolError(f"sequence {seq_id} was not begun", stage=self.stage)
        return sequence

    def _restore(self, step: Step) -> Step:
        """Read blocks from disk, and note how far every stage so far came."""
        if step.drop and self.disk is not None:
            self.disk.drop(step.drop)
        reached = dict(step.restored)
        for blocks in step.restore:
            sequence = self._known(blocks.seq_id)
            if sequence.restoring and not blocks.offset:
                sequence.go_back(0)
            # An order that does not follow what the cache holds follows one that failed.
            if sequence.restoring and sequence.length == blocks.offset:
                sequence.length = read_blocks(self.disk, sequence, blocks, drafts=self.drafts)
            reached[blocks.seq_id] = min(sequence.length, reached.get(blocks.seq_id, sequence.length))
        return replace(step, restored=tuple(reached.items())) if reached else step

    def _begin(self, start: SequenceStart) -> None:
        if start.seq_id in self._sequences:
            raise ProtocolError(f"sequence {start.seq_id} began twice", stage=self.stage)
        if start.adapter not in self.models:
            raise ProtocolError(
                f"sequence {start.seq_id} asks for an adapter that this stage does not hold",
                stage=self.stage,
                found=start.adapter,
            )
        sampler = SequenceSampler(start) if self.model.is_last else None
        draft = self.drafts.begin(prompt_tokens=start.prompt_tokens) if self.drafts is not None else None
        snapshots: dict[int, Snapshot] = {}
        if start.source is None:
            caches = self.model.make_cache()
        else:
            held = self._known(start.source).snapshots
            snapshots = {position: held[position] for position in start.snapshots if position in held}
            caches, draft = self._prefix(start, start.source)
        total = start.prompt_tokens + len(start.history)
        if start.request_id:  # a warm-up has none
            logger.info("%s begins: %d tokens, %d of them held", start.request_id, total, start.restore)
        moved_from = (start.source, start.restore) if start.move and start.source is not None else None
        self._sequences[start.seq_id] = SequenceState(
            caches,
            length=start.restore,
            sampler=sampler,
            total=total,
            draft=draft,
            snapshots=snapshots,
            moved_from=moved_from,
            adapter=start.adapter,
        )

    def _prefix(self, start: SequenceStart, source: int) -> tuple[list[Any], DraftState | None]:
        """Caches that begin as those of another sequence, and what the draft head holds of it."""
        sequence = self._known(source)
        if source in self._failed:
            self._failed[start.seq_id] = replace(self._failed[source], seq_id=start.seq_id)
            if start.move:
                del self._sequences[source], self._failed[source]
            return self.model.make_cache(), None
        if sequence.adapter != start.adapter:
            raise ProtocolError(
                f"sequence {start.seq_id} begins from one of another adapter",
                stage=self.stage,
                expected=start.adapter,
                found=sequence.adapter,
            )
        if sequence.length < start.restore:
            raise ProtocolError(
                f"sequence {start.seq_id} begins with more than sequence {source} has",
                stage=self.stage,
                expected=f"at most {sequence.length} tokens",
                found=start.restore,
            )
        snapshot = sequence.snapshots.get(start.restore)
        if start.move:
            del self._sequences[source]
            trim(sequence.caches, start.restore, snapshot=snapshot)
            if (draft := sequence.draft) is not None:
                draft.keep(start.restore)
                draft.prompt_tokens = start.prompt_tokens
            return sequence.caches, draft
        caches = self.model.make_cache()
        total = start.prompt_tokens + len(start.history)
        capacity = capacity_for(total, caches)
        copy_prefix(sequence.caches, caches, length=start.restore, capacity=capacity, snapshot=snapshot)
        if self.drafts is None or sequence.draft is None:
            return caches, None
        draft = self.drafts.copy(sequence.draft, length=start.restore, total=total, prompt_tokens=start.prompt_tokens)
        return caches, draft

    def _run(self, step: Step, prepared: PreparedStep | None) -> Step | StepResult:
        sequences = [self._sequences[segment.seq_id] for segment in step.segments]
        for segment, entry in zip(step.segments, sequences, strict=True):
            entry.settle(segment.offset)
        result: Step | StepResult
        if self.model.is_last:
            rest = step if prepared is None else prepared.rest(step)
            out = features = None
            if rest.segments:
                rest, out, features = self._forward_each(rest)
            if prepared is None and rest is not step:
                step = rest
                sequences = [self._sequences[segment.seq_id] for segment in step.segments]
            self._observe(step, sequences)
            logits = self._logits(rest, out) if out is not None else None
            if prepared is not None:
                logits = prepared.joined(step, logits)
                features = prepared.joined_features(step, features)
            sampled = self._sample(step, sequences, logits)
            result = self._answer(step, sampled, self._draft(step, sequences, features, sampled))
        else:  # only a stage that is the whole model prepares steps
            step, out, features = self._forward_each(step)
            sequences = [self._sequences[segment.seq_id] for segment in step.segments]
            if out is not None and features is not None:
                out = mx.concatenate([out, features], axis=1)
            result = replace(without_pictures(step), hidden=None if out is None else pack(out))
        for segment, entry in zip(step.segments, sequences, strict=True):
            entry.length += segment.length
            entry.drafts = segment.drafts
            if segment.snapshot:
                entry.snapshots[entry.length] = take_snapshot(entry.caches)
        return result

    def _forward_each(self, step: Step) -> tuple[Step, mx.array | None, mx.array | None]:
        """The hidden states and features of a step, and the step; without the sequences whose experts cannot be read, where there
        are any."""
        try:
            return step, *self._forward(step)
        except ExpertReadError as error:
            self._roll_back(step)
            if len(step.segments) == 1:
                return self._fail(step, {step.segments[0].seq_id: error}), None, None
        # Somebody else's tokens asked for it: each by itself tells whose.
        failed: dict[int, ExpertReadError] = {}
        outs: list[tuple[mx.array, mx.array | None]] = []
        for segment in step.segments:
            alone = _rest_of(step, {each.seq_id for each in step.segments} - {segment.seq_id})
            try:
                outs.append(self._forward(alone))
            except ExpertReadError as error:
                self._roll_back(alone)
                failed[segment.seq_id] = error
        hidden = [out for out, _ in outs]
        features = [each for _, each in outs if each is not None]
        return (
            self._fail(step, failed),
            mx.concatenate(hidden) if hidden else None,
            mx.concatenate(features) if features else None,
        )

    def _roll_back(self, step: Step) -> None:
        for segment in step.segments:
            sequence = self._sequences[segment.seq_id]
            trim(sequence.caches, sequence.length)

    def _fail(self, step: Step, errors: Mapping[int, ExpertReadError]) -> Step:
        for seq_id, error in errors.items():
            error.stage = self.stage
            self._failed[seq_id] = FailedSequence.of(seq_id, error)
        return self._without_failed(step)

    def _forward(self, step: Step) -> tuple[mx.array, mx.array | None]:
        model = self.model
        if model.is_first:
            x = mx.array(step.tokens) if not step.pictures else self._embed(step)
        elif step.hidden is None:
            raise ProtocolError("a step without hidden states reached a stage that is not the first", stage=self.stage)
        else:
            width = width_of(model, self.feature_layers)
            x = unpack(step.hidden, tokens=len(step.tokens), hidden_size=width)
        asked = [_asked(segment) for segment in step.segments] if model.is_last and not self.asks_all else None
        segments = [(segment.length, self._sequences[segment.seq_id].caches) for segment in step.segments]
        adapters = [self._sequences[segment.seq_id].adapter for segment in step.segments]
        return self.models.forward(x, segments, adapters, feature_layers=self.feature_layers, asked=asked)

    def _embed(self, step: Step) -> mx.array:
        if self.tower is None:
            raise ProtocolError("a picture reached a stage without a vision tower", stage=self.stage)
        return self.tower.embed(step, self.model)

    def _observe(self, step: Step, sequences: list[SequenceState]) -> None:
        for segment, entry, end in zip(step.segments, sequences, _ends(step), strict=True):
            if entry.sampler is not None:
                entry.sampler.observe(step.tokens[end - segment.length : end - segment.drafts])

    def _logits(self, step: Step, out: mx.array) -> mx.array | None:
        """After each position that asks for a token, and after each guess."""
        rows = [np.arange(end - _asked(segment), end) for segment, end in zip(step.segments, _ends(step), strict=True)]
        # No lazy graph outlives a step: of tokens that nobody asked for, only what the last layer left in the caches.
        unasked = [segment for segment in step.segments if segment.length > _asked(segment)]
        mx.eval([cache.state for segment in unasked for cache in self._sequences[segment.seq_id].caches])
        if not any(map(len, rows)):
            return None
        return self.model.logits(out[mx.array(np.concatenate(rows).astype(np.int32))]).astype(mx.float32)

    def _sample(self, step: Step, sequences: list[SequenceState], logits: mx.array | None) -> tuple[Sampled, ...]:
        if logits is None:
            return ()
        mx.eval(logits)
        rows = [row for row, segment in enumerate(step.segments) if segment.sample]
        ends = _ends(step)
        drafts = [step.tokens[ends[row] - step.segments[row].drafts : ends[row]] for row in rows]
        samplers = [sampler for row in rows if (sampler := sequences[row].sampler) is not None]
        return sample_runs(np.asarray(logits), samplers, [step.segments[row].masks for row in rows], drafts)

    def _draft(
        self,
        step: Step,
        sequences: list[SequenceState],
        features: mx.array | None,
        sampled: tuple[Sampled, ...],
    ) -> tuple[Proposal, ...]:
        """Let the draft head follow the step, and guess."""
        if self.drafts is None or features is None:
            return ()
        for segment, entry in zip(step.segments, sequences, strict=True):
            if entry.draft is not None and entry.draft.length != segment.offset:
                entry.draft = None  # such as of a block that a disk had without it
        return self.drafts.follow(step, [(entry.draft, entry.sampler) for entry in sequences], features, sampled)

    def _answer(self, step: Step, sampled: tuple[Sampled, ...], proposals: tuple[Proposal, ...] = ()) -> StepResult:
        return StepResult(
            epoch=step.epoch,
            step_id=step.step_id,
            sampled=sampled,
            restored=step.restored,
            failed=step.failed,
            proposals=proposals,
        )


def _rest_of(step: Step, left_out: Container[int]) -> Step:
    """A step without the segments of some sequences."""
    kept = [index for index, segment in enumerate(step.segments) if segment.seq_id not in left_out]
    if len(kept) == len(step.segments):
        return step
    ends = _ends(step)
    rows = [np.arange(ends[index] - step.segments[index].length, ends[index]) for index in kept]
    chosen = np.concatenate([np.zeros(0, np.int64), *rows]).astype(np.int64)
    return replace(
        step,
        segments=tuple(step.segments[index] for index in kept),
        tokens=step.tokens[chosen],
        hidden=None if step.hidden is None else step.hidden.rows(chosen),
    )


def _asked(segment: Segment) -> int:
    """Tokens at a segment's end after which the next one is drawn or verified."""
    return segment.drafts + 1 if segment.sample else 0


def _ends(step: Step) -> np.ndarray[Any, Any]:
    """Where each segment's tokens end."""
    return np.cumsum([segment.length for segment in step.segments])


def as_fault(error: BaseException, *, stage: int | None) -> RuntimeFault:
    """Any error of a stage's computation as the RuntimeFault that a request should see."""
    if isinstance(error, RuntimeFault):
        return error
    text = str(error) or type(error).__name__
    if is_out_of_memory(error):
        return StageOutOfMemoryError(
            f"stage {stage} ran out of memory", stage=stage, found=text, fix="a smaller --context, or more stages"
        )
    if (known := machine_error(error)) is not None:
        return StageError(f"stage {stage} failed", stage=stage, found=known.what, where=known.where, fix=known.fix)
    return StageError(f"stage {stage} failed: {type(error).__name__}: {text}", stage=stage)
