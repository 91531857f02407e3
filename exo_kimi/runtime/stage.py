"""The pure compute of one stage: steps in, hidden states or token ids out; it knows nothing of sockets or scheduling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from exo_kimi.errors import ProtocolError, RuntimeFault, StageError, StageOutOfMemoryError
from exo_kimi.runtime.held import Held
from exo_kimi.runtime.hidden import pack, unpack
from exo_kimi.runtime.prefix_disk import PrefixDisk
from exo_kimi.runtime.prefix_kv import capacity_for, copy_prefix, trim
from exo_kimi.runtime.prefix_stage import read_blocks, write_blocks
from exo_kimi.runtime.sampling import SequenceSampler
from exo_kimi.runtime.stage_model import StageModel as StageModel
from exo_kimi.runtime.steps import Sampled, SequenceStart, Step, StepResult
from exo_kimi.runtime.verify import sample_runs


class StageWorker:
    """Runs the steps of one stage, in order, on the thread that loaded the model.

    Args:
        model: this stage's layers.
        epoch: steps of any other epoch are refused.
        stage: index of the stage, for errors.
        disk: where it keeps prefixes; may be set later.
    """

    def __init__(
        self, model: StageModel, *, epoch: int, stage: int | None = None, disk: PrefixDisk | None = None
    ) -> None:
        self.model = model
        self.epoch = epoch
        self.stage = stage
        self.disk = disk
        self._held: dict[int, Held] = {}

    @property
    def sequences(self) -> int:
        """How many sequences are registered."""
        return len(self._held)

    @property
    def kv_nbytes(self) -> int:
        """Bytes that the caches hold."""
        return sum(self.model.cache_nbytes(held.caches) for held in self._held.values())

    def reset(self, epoch: int) -> None:
        """Drop every sequence and go on in `epoch`."""
        self._held.clear()
        self.epoch = epoch
        mx.clear_cache()

    def execute(self, step: Step) -> Step | StepResult:
        """Carry out a step; everything is evaluated when it returns.

        Returns:
            The step with this stage's hidden states (None when it has no segments), or the last stage's StepResult.

        Raises:
            ProtocolError: a step that contradicts what this stage holds.
            StageError: logits that are not finite.
            StageOutOfMemoryError: MLX could not allocate.
        """
        if step.epoch != self.epoch:
            raise ProtocolError("a step of another epoch", stage=self.stage, expected=self.epoch, found=step.epoch)
        try:
            self._free(step.free)
            for start in step.begin:
                self._begin(start)
            step = self._restore(step)
            result = self._work(step)
            for blocks in step.store:
                write_blocks(self.disk, self._known(blocks.seq_id).caches, blocks)
            return result
        except RuntimeFault as fault:
            fault.stage = self.stage if fault.stage is None else fault.stage
            raise
        except (RuntimeError, ValueError, MemoryError) as error:  # what MLX raises
            raise as_fault(error, stage=self.stage) from error

    def _work(self, step: Step) -> Step | StepResult:
        if not step.segments:
            return self._answer(step, ()) if self.model.is_last else replace(step, hidden=None)
        for segment in step.segments:
            if segment.seq_id in self._held:
                self._held[segment.seq_id].begin_at(segment.offset)
        self._check(step)
        return self._run(step)

    def _known(self, seq_id: int) -> Held:
        held = self._held.get(seq_id)
        if held is None:
            raise ProtocolError(f"sequence {seq_id} was not begun", stage=self.stage)
        return held

    def _restore(self, step: Step) -> Step:
        """Read blocks from disk, and note how far every stage so far came."""
        if step.drop and self.disk is not None:
            self.disk.drop(step.drop)
        reached = dict(step.restored)
        for blocks in step.restore:
            held = self._known(blocks.seq_id)
            # An order that does not follow what is held follows one that failed.
            if held.restoring and held.length == blocks.offset:
                held.length = read_blocks(self.disk, held.caches, blocks, total=held.total)
            reached[blocks.seq_id] = min(held.length, reached.get(blocks.seq_id, held.length))
        return replace(step, restored=tuple(reached.items())) if reached else step

    def _free(self, seq_ids: Sequence[int]) -> None:
        # An id that is not held was never begun: its sequence ended before its first segment.
        dropped = [self._held.pop(seq_id, None) for seq_id in seq_ids]
        if dropped and not self._held:
            mx.clear_cache()

    def _begin(self, start: SequenceStart) -> None:
        if start.seq_id in self._held:
            raise ProtocolError(f"sequence {start.seq_id} began twice", stage=self.stage)
        sampler = SequenceSampler(start) if self.model.is_last else None
        caches = self.model.make_cache() if start.source is None else self._prefix(start, start.source)
        total = start.prompt_tokens + len(start.history)
        self._held[start.seq_id] = Held(caches, length=start.restore, sampler=sampler, total=total)

    def _prefix(self, start: SequenceStart, source: int) -> list[Any]:
        """Caches that begin as those of another sequence."""
        held = self._known(source)
        if held.length < start.restore:
            raise ProtocolError(
                f"sequence {start.seq_id} begins with more than sequence {source} has",
                stage=self.stage,
                expected=f"at most {held.length} tokens",
                found=start.restore,
            )
        if start.move:
            del self._held[source]
            trim(held.caches, start.restore)
            return held.caches
        caches = self.model.make_cache()
        capacity = capacity_for(start.prompt_tokens + len(start.history), caches)
        copy_prefix(held.caches, caches, length=start.restore, capacity=capacity)
        return caches

    def _check(self, step: Step) -> None:
        total = sum(segment.length for segment in step.segments)
        if step.tokens.shape != (total,):
            raise ProtocolError(
                "the tokens of a step do not fill its segments",
                stage=self.stage,
                expected=f"{total} tokens",
                found=f"shape {step.tokens.shape}",
            )
        if len({segment.seq_id for segment in step.segments}) != len(step.segments):
            raise ProtocolError("a sequence has two segments in one step", stage=self.stage)
        if total and not 0 <= int(step.tokens.min()) <= int(step.tokens.max()) < self.model.args.vocab_size:
            raise ProtocolError(
                "a token id outside the vocabulary",
                stage=self.stage,
                expected=f"0 to {self.model.args.vocab_size - 1}",
                found=f"{step.tokens.min()} to {step.tokens.max()}",
            )
        for segment in step.segments:
            held = self._held.get(segment.seq_id)
            if held is None or not held.length - held.drafts <= segment.offset <= held.length or segment.length < 1:
                raise ProtocolError(
                    f"a segment of sequence {segment.seq_id} does not follow what the stage holds",
                    stage=self.stage,
                    expected="a sequence that was begun"
                    if held is None
                    else f"offset {held.length}{f' or up to {held.drafts} less' * bool(held.drafts)}, length at least 1",
                    found=f"offset {segment.offset}, length {segment.length}",
                )
            if segment.drafts and (segment.drafts >= segment.length or not segment.sample or segment.mask is not None):
                raise ProtocolError(
                    f"drafts of sequence {segment.seq_id} that cannot be checked",
                    stage=self.stage,
                    expected="a token before them, `sample`, and no mask",
                    found=f"length {segment.length}, {segment.drafts} drafts",
                )

    def _run(self, step: Step) -> Step | StepResult:
        model = self.model
        total = len(step.tokens)
        if model.is_first:
            x = mx.array(step.tokens)
        elif step.hidden is None:
            raise ProtocolError("a step without hidden states reached a stage that is not the first", stage=self.stage)
        else:
            x = unpack(step.hidden, tokens=total, hidden_size=model.args.hidden_size)
        held = [self._held[segment.seq_id] for segment in step.segments]
        for segment, entry in zip(step.segments, held, strict=True):
            entry.settle(segment.offset)
        unasked = model.is_last and not any(segment.sample for segment in step.segments)
        segments = [(s.length, h.caches) for s, h in zip(step.segments, held, strict=True)]
        out = model.forward_ragged(x, segments, caches_only=unasked)
        ends = np.cumsum([segment.length for segment in step.segments])
        result: Step | StepResult
        if model.is_last:
            self._observe(step, held, ends)
            result = self._answer(step, self._sample(step, held, ends, out))
        else:
            result = replace(step, hidden=pack(out))
        for segment, entry in zip(step.segments, held, strict=True):
            entry.length += segment.length
            entry.drafts = segment.drafts
        return result

    def _observe(self, step: Step, held: list[Held], ends: np.ndarray[Any, Any]) -> None:
        for segment, entry, end in zip(step.segments, held, ends, strict=True):
            if entry.sampler is not None:
                entry.sampler.observe(step.tokens[end - segment.length : end - segment.drafts])

    def _sample(self, step: Step, held: list[Held], ends: np.ndarray[Any, Any], out: mx.array) -> tuple[Sampled, ...]:
        rows = [row for row, segment in enumerate(step.segments) if segment.sample]
        if not rows:
            # No lazy graph outlives a step. The last layer's output is not needed, only what it left in the caches.
            mx.eval([cache.state for entry in held for cache in entry.caches])
            return ()
        drafts = [step.tokens[ends[row] - step.segments[row].drafts : ends[row]] for row in rows]
        asked = [np.arange(ends[row] - 1 - len(guess), ends[row]) for row, guess in zip(rows, drafts, strict=True)]
        logits = self.model.logits(out[mx.array(np.concatenate(asked).astype(np.int32))]).astype(mx.float32)
        mx.eval(logits)
        samplers = [sampler for row in rows if (sampler := held[row].sampler) is not None]
        return sample_runs(np.asarray(logits), samplers, [step.segments[row].mask for row in rows], drafts)

    def _answer(self, step: Step, sampled: tuple[Sampled, ...]) -> StepResult:
        return StepResult(epoch=step.epoch, step_id=step.step_id, sampled=sampled, restored=step.restored)


def as_fault(error: BaseException, *, stage: int | None) -> RuntimeFault:
    """Any error of a stage's computation as the RuntimeFault that a request should see."""
    if isinstance(error, RuntimeFault):
        return error
    text = str(error) or type(error).__name__
    lowered = text.lower()
    if isinstance(error, MemoryError) or any(sign in lowered for sign in ("out of memory", "malloc", "allocate")):
        return StageOutOfMemoryError(
            f"stage {stage} ran out of memory", stage=stage, found=text, fix="a smaller --context, or more stages"
        )
    return StageError(f"stage {stage} failed: {type(error).__name__}: {text}", stage=stage)
