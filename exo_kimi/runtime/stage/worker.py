"""The pure compute of one stage: steps in, hidden states or token ids out; it knows nothing of sockets or scheduling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from exo_kimi.errors import ProtocolError, RuntimeFault, StageError, StageOutOfMemoryError
from exo_kimi.runtime.stage.hidden_states import pack, unpack
from exo_kimi.runtime.stage.lookahead import Ahead, Ready
from exo_kimi.runtime.stage.model_protocol import StageModel as StageModel
from exo_kimi.runtime.stage.prefix_disk import PrefixDisk
from exo_kimi.runtime.stage.prefix_kv import capacity_for, copy_prefix, trim
from exo_kimi.runtime.stage.prefix_stage import read_blocks, write_blocks
from exo_kimi.runtime.stage.sampling import SequenceSampler
from exo_kimi.runtime.stage.sequence_state import Held
from exo_kimi.runtime.stage.step_check import check_step
from exo_kimi.runtime.stage.verify import sample_runs
from exo_kimi.runtime.steps import Sampled, Segment, SequenceStart, Step, StepResult


class StageWorker:
    """Runs the steps of one stage, in order, on the thread that loaded the model.

    Args:
        model: this stage's layers.
        epoch: steps of any other epoch are refused.
        stage: index of the stage, for errors.
        disk: where it keeps prefixes; may be set later.
        ahead: whether `run_ahead` does anything on a stage that is the whole model.
    """

    def __init__(
        self,
        model: StageModel,
        *,
        epoch: int,
        stage: int | None = None,
        disk: PrefixDisk | None = None,
        ahead: bool = True,
    ) -> None:
        self.model = model
        self.epoch = epoch
        self.stage = stage
        self.disk = disk
        self.ahead = Ahead(model, enabled=ahead)
        self._held: dict[int, Held] = {}
        self._answered: tuple[Step, StepResult] | None = None

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
        self.ahead.forget()
        self._answered = None
        self.epoch = epoch
        mx.clear_cache()

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
        try:
            ready = self.ahead.settle(step, self._held)
            self._free(step.free)
            for start in step.begin:
                self._begin(start)
            step = self._restore(step)
            result = self._work(step, ready)
            for blocks in step.store:
                write_blocks(self.disk, self._known(blocks.seq_id).caches, blocks)
            self._answered = (step, result) if isinstance(result, StepResult) else None
            return result
        except RuntimeFault as fault:
            fault.stage = self.stage if fault.stage is None else fault.stage
            raise
        except (RuntimeError, ValueError, MemoryError) as error:  # what MLX raises
            raise as_fault(error, stage=self.stage) from error

    def run_ahead(self) -> None:
        """Begin with what will follow the last answer, if that is known; to be called once it is on its way.

        Raises:
            StageError, StageOutOfMemoryError: as of `execute`.
        """
        answered, self._answered = self._answered, None
        if answered is not None:
            try:
                self.ahead.enqueue(*answered, self._held)
            except (RuntimeError, ValueError, MemoryError) as error:
                raise as_fault(error, stage=self.stage) from error

    def _work(self, step: Step, ready: Ready | None) -> Step | StepResult:
        if not step.segments:
            return self._answer(step, ()) if self.model.is_last else replace(step, hidden=None)
        for segment in step.segments:
            if segment.seq_id in self._held:
                self._held[segment.seq_id].begin_at(segment.offset)
        check_step(step, self._held, vocab_size=self.model.args.vocab_size, stage=self.stage)
        return self._run(step, ready)

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

    def _run(self, step: Step, ready: Ready | None) -> Step | StepResult:
        held = [self._held[segment.seq_id] for segment in step.segments]
        for segment, entry in zip(step.segments, held, strict=True):
            entry.settle(segment.offset)
        rest = step if ready is None else ready.rest(step)
        out = self._forward(rest) if rest.segments else None
        result: Step | StepResult
        if self.model.is_last:
            self._observe(step, held)
            logits = self._logits(rest, out) if out is not None else None
            result = self._answer(
                step, self._sample(step, held, logits if ready is None else ready.joined(step, logits))
            )
        else:
            assert out is not None
            result = replace(step, hidden=pack(out))
        for segment, entry in zip(step.segments, held, strict=True):
            entry.length += segment.length
            entry.drafts = segment.drafts
        return result

    def _forward(self, step: Step) -> mx.array:
        model = self.model
        if model.is_first:
            x = mx.array(step.tokens)
        elif step.hidden is None:
            raise ProtocolError("a step without hidden states reached a stage that is not the first", stage=self.stage)
        else:
            x = unpack(step.hidden, tokens=len(step.tokens), hidden_size=model.args.hidden_size)
        asked = [_asked(segment) for segment in step.segments] if model.is_last else None
        segments = [(segment.length, self._held[segment.seq_id].caches) for segment in step.segments]
        return model.forward_ragged(x, segments, asked=asked)

    def _observe(self, step: Step, held: list[Held]) -> None:
        for segment, entry, end in zip(step.segments, held, _ends(step), strict=True):
            if entry.sampler is not None:
                entry.sampler.observe(step.tokens[end - segment.length : end - segment.drafts])

    def _logits(self, step: Step, out: mx.array) -> mx.array | None:
        """After each position that asks for a token, and after each guess."""
        rows = [np.arange(end - _asked(segment), end) for segment, end in zip(step.segments, _ends(step), strict=True)]
        # No lazy graph outlives a step: of tokens that nobody asked for, only what the last layer left in the caches.
        unasked = [segment for segment in step.segments if segment.length > _asked(segment)]
        mx.eval([cache.state for segment in unasked for cache in self._held[segment.seq_id].caches])
        if not any(map(len, rows)):
            return None
        return self.model.logits(out[mx.array(np.concatenate(rows).astype(np.int32))]).astype(mx.float32)

    def _sample(self, step: Step, held: list[Held], logits: mx.array | None) -> tuple[Sampled, ...]:
        if logits is None:
            return ()
        mx.eval(logits)
        rows = [row for row, segment in enumerate(step.segments) if segment.sample]
        ends = _ends(step)
        drafts = [step.tokens[ends[row] - step.segments[row].drafts : ends[row]] for row in rows]
        samplers = [sampler for row in rows if (sampler := held[row].sampler) is not None]
        return sample_runs(np.asarray(logits), samplers, [step.segments[row].mask for row in rows], drafts)

    def _answer(self, step: Step, sampled: tuple[Sampled, ...]) -> StepResult:
        return StepResult(epoch=step.epoch, step_id=step.step_id, sampled=sampled, restored=step.restored)


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
    lowered = text.lower()
    if isinstance(error, MemoryError) or any(sign in lowered for sign in ("out of memory", "malloc", "allocate")):
        return StageOutOfMemoryError(
            f"stage {stage} ran out of memory", stage=stage, found=text, fix="a smaller --context, or more stages"
        )
    return StageError(f"stage {stage} failed: {type(error).__name__}: {text}", stage=stage)
