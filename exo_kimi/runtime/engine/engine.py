"""The engine behind the API: requests in, tokens out, over any Pipeline.

Two loops. The sending one asks the Scheduler for the next step and hands it to the pipeline; the receiving one gives results back
to the Scheduler and each new token to the caller who waits for it in `generate`.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from dataclasses import replace
from typing import Any, Self

from exo_kimi.errors import EngineStoppedError, ExoKimiError, OverloadedError, RequestError, RuntimeFault, StageError
from exo_kimi.runtime.engine.admission import Limits, check_request
from exo_kimi.runtime.engine.counters import Counters
from exo_kimi.runtime.engine.pacing import PrefillPacer
from exo_kimi.runtime.engine.prefix_cache import PrefixOptions
from exo_kimi.runtime.engine.scheduler import Scheduler
from exo_kimi.runtime.engine.sequence import Sequence, StepOutcome
from exo_kimi.runtime.engine.speculation import Drafter, disk_cost_of
from exo_kimi.runtime.engine.survival import Survival
from exo_kimi.runtime.pipeline import DiskBlocks, Failed, Pipeline, Ready
from exo_kimi.runtime.requests import (
    EngineSnapshot,
    ForkableConstraint,
    GenerationRequest,
    TokenConstraint,
    TokenEvent,
)
from exo_kimi.runtime.reserve import MOST_RUNNING
from exo_kimi.runtime.steps import Step, StepResult
from exo_kimi.runtime.token_mask import allowed

logger = logging.getLogger(__name__)

DISK_COST_STEPS = 32
"""How often it is asked what reading experts from disk costs, which a guess must pay for."""

FAILED_GRACE_S = 1.0
"""How long after a refused step the pipeline may take to tell what failed."""


class Engine:
    """Implements `requests.TextEngine`. Use it as `async with Engine(pipeline) as engine`, or `start` and `close` it.

    Args:
        pipeline: the stages; the engine closes it.
        context: most positions of a sequence; None takes the pipeline's.
        prefill_chunk: tokens of one step at most; `pacing` chooses how many.
        queue_limit: requests that may wait; one more is refused.
        max_running: sequences that may hold KV memory at a time.
        drafter: guesses tokens ahead, so that a step may give several; it changes no token. None does not.
        prefixes: what is kept of sequences that ended, for others that begin like them; None keeps nothing.
        survive_s: how long stages that failed may be away before a request that they lost gets the error; until then it waits and
            goes on with the same tokens. 0: it gets the error at once. See `survival`.
        clock: by which steps are timed, in seconds; `bench drafts` gives the processor's.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        context: int | None = None,
        prefill_chunk: int = 512,
        queue_limit: int = 256,
        max_running: int = MOST_RUNNING,
        drafter: Drafter | None = None,
        prefixes: PrefixOptions | None = None,
        survive_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pipeline = pipeline
        self.queue_limit = queue_limit
        self._context = context
        self._scheduler = Scheduler(
            stages=pipeline.stages,
            prefill_chunk=prefill_chunk,
            max_running=max_running,
            drafter=drafter,
            prefixes=prefixes,
        )
        self._survival = Survival(survive_s, waiting=lambda: self._scheduler.waiting, on_overdue=self._give_up_on)
        self._pacer = PrefillPacer(
            stages=pipeline.stages, prefill_chunk=prefill_chunk, clock=clock, streams=self._reads_experts
        )
        self._limits: Limits | None = None
        self._down: RuntimeFault | None = None
        self._closed = False
        self._streams: dict[Sequence, asyncio.Queue[TokenEvent | ExoKimiError]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._wake = asyncio.Event()
        self._ready = asyncio.Event()
        self._refused_epoch: int | None = None
        self._broken = asyncio.Event()
        self._counters = Counters()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Begin to serve; returns at once (see `wait_ready`)."""
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._guard(loop)) for loop in (self._receive_loop(), self._send_loop())]

    async def wait_ready(self) -> None:
        """Wait until the stages are ready for the first time.

        Raises:
            RuntimeFault: they will never be, or the engine was closed.
        """
        await self._ready.wait()
        self._raise_if_down()

    async def wait_broken(self) -> None:
        """Wait until one of the two loops has ended without `close`: no request will ever be served again.

        Raises:
            RuntimeFault: always, in the end: why.
        """
        await self._broken.wait()
        self._raise_if_down()

    def check(self, request: GenerationRequest) -> int | None:
        """Raise what `generate` would raise before admitting the request; see `TextEngine.check`."""
        self._raise_if_down()
        if len(self._scheduler.waiting) >= self.queue_limit:
            raise OverloadedError(
                "the server's queue is full",
                code="overloaded",
                found=f"{len(self._scheduler.waiting)} requests waiting",
                fix="try again later, or serve with a larger --queue-limit",
            )
        return None if self._limits is None else check_request(request, self._limits)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """Yield the tokens of one request; closing the generator cancels the request on every stage."""
        self.check(request)
        stream: asyncio.Queue[TokenEvent | ExoKimiError] = asyncio.Queue()
        sequence = self._submit(request, stream)
        outcome = "cancelled"
        try:
            while True:
                item = await stream.get()
                if isinstance(item, ExoKimiError):
                    outcome = type(item).__name__
                    raise item
                outcome = item.finish_reason or outcome
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            self._abandon(sequence)
            _log_end(sequence, outcome)

    def snapshot(self) -> EngineSnapshot:
        """The engine's state now."""
        return self._counters.snapshot(
            self._scheduler,
            self._limits,
            closed=self._closed,
            context=self._context,
            stages=self.pipeline.health(),
            sequences=self._streams,
            survival=self._survival.counts,
        )

    async def close(self) -> None:
        """Fail what is in flight with EngineStoppedError and stop every stage; idempotent."""
        if not self._closed:
            self._closed = True
            self._counters.note("the server is shutting down")
            self._stop(EngineStoppedError("the server is shutting down"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.pipeline.close()

    def _submit(self, request: GenerationRequest, stream: asyncio.Queue[TokenEvent | ExoKimiError]) -> Sequence:
        seed = secrets.randbits(63) if request.sampling.seed is None else request.sampling.seed % 2**64
        request = replace(request, sampling=replace(request.sampling, seed=seed))
        room = check_request(request, self._limits) if self._limits else 0  # 0: set when the stages are ready
        now_s = asyncio.get_running_loop().time()
        sequence = Sequence(request=request, order=self._counters.requests, max_new_tokens=room, submitted_s=now_s)
        self._counters.requests += 1
        try:
            self._update_mask(sequence)
        except ExoKimiError:
            self._counters.failed += 1
            raise
        self._streams[sequence] = stream
        self._scheduler.add(sequence)
        self._wake.set()
        return sequence

    def _abandon(self, sequence: Sequence) -> None:
        """The reader is gone; a sequence that did not end by itself is cancelled."""
        self._streams.pop(sequence, None)
        if sequence.state != "ended":
            self._counters.cancelled += 1
            self._scheduler.end(sequence)
            self._wake.set()

    async def _send_loop(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._refused_epoch != self._scheduler.epoch and (step := self._next_step()) is not None:
                try:
                    self._pacer.sent(step)
                    await self.pipeline.send(step)
                    self._counters.steps += 1
                except RuntimeFault as fault:
                    # A Failed event tells why, before or after this; its cause says more than the refusal does.
                    self._refused_epoch = step.epoch
                    asyncio.get_running_loop().call_later(FAILED_GRACE_S, self._fail_epoch, step.epoch, fault)

    def _next_step(self) -> Step | None:
        step = self._scheduler.next_step(self._pacer.chunk)
        if step is not None and step.begin:
            begun, now_s = {start.seq_id for start in step.begin}, asyncio.get_running_loop().time()
            for sequence in self._scheduler.running:
                if sequence.seq_id in begun and sequence.queue_s is None:
                    sequence.queue_s = now_s - sequence.submitted_s
        return step

    def _reads_experts(self) -> bool:
        return any(stage.experts is not None for stage in self.pipeline.health())

    async def _receive_loop(self) -> None:
        while True:
            event = await self.pipeline.receive()
            if isinstance(event, Ready):
                self._on_ready(event)
            elif isinstance(event, Failed):
                self._counters.note(f"{type(event.error).__name__}: {event.error.what}")
                self._fail(event.error)
                if not event.recovering:
                    self._refuse(event.error)
            elif isinstance(event, DiskBlocks):
                if event.epoch == self._scheduler.epoch:
                    self._scheduler.on_disk_blocks(event)
            elif event.epoch == self._scheduler.epoch:
                self._on_result(event)
            self._wake.set()

    async def _guard(self, loop: Coroutine[Any, Any, None]) -> None:
        """Run one of the two loops; whatever ends it ends every request instead of leaving it to hang."""
        try:
            await loop
        except EngineStoppedError as stopped:
            self._stop(stopped)
        except Exception as error:
            logger.exception("the engine stopped")
            self._counters.note(f"the engine stopped: {type(error).__name__}: {error}")
            fault = error if isinstance(error, RuntimeFault) else StageError(f"the engine stopped: {error!r}")
            self._stop(fault)
            self._broken.set()
            for task in self._tasks:  # the other loop alone would take requests that nobody serves
                if task is not asyncio.current_task():
                    task.cancel()

    def _on_ready(self, event: Ready) -> None:
        if self._scheduler.epoch is not None:  # no Failed came before
            self._fail(StageError("the stages started again"))
        self._limits = Limits.of(event.info, context=self._context)
        kept_tokens = self._scheduler.open(event, self._limits)
        self._pacer.forget()
        self._counters.epochs += 1
        self._down = None
        self._survival.on_back()
        self._ready.set()
        self._counters.note(
            f"ready: {self.pipeline.stages} stages, KV memory for {self._limits.kv_capacity_tokens} tokens"
            + (f", {kept_tokens} tokens still cached" if kept_tokens else "")
        )
        for sequence in list(self._scheduler.waiting):
            try:
                room = check_request(sequence.request, self._limits)
            except RequestError as refusal:  # it came before the limits were known, or they shrank
                self._end_with(sequence, refusal)
                continue
            if sequence.interruption is None:
                sequence.max_new_tokens = room
            elif room <= sequence.generated_tokens:
                self._give_up_on(sequence)  # less memory came back than it had filled
            else:
                sequence.max_new_tokens = min(room, sequence.max_new_tokens)

    def _on_result(self, result: StepResult) -> None:
        taken_s = self._pacer.answered(result.step_id)
        drafter = self._scheduler.drafter
        if drafter is not None:
            drafter.step_s = taken_s
        if drafter is not None and result.step_id % DISK_COST_STEPS == 0:
            drafter.disk_cost = disk_cost_of(self.pipeline.health())
        for outcome in self._scheduler.complete(result):
            self._counters.generated += 1
            self._deliver(outcome)
        for sequence in self._scheduler.running if result.proposals else ():
            if sequence.proposed and sequence.request.constraint is not None:
                self._mask_proposal(sequence, sequence.request.constraint)
        for sequence, error in self._scheduler.failures(result):
            self._counters.failed += 1
            self._counters.note(f"{type(error).__name__}: {error.what}")
            self._end_with(sequence, error)

    def _deliver(self, outcome: StepOutcome) -> None:
        sequence, sampled = outcome.sequence, outcome.sampled
        self._survival.on_token(sequence)
        reason = sequence.finish_reason()
        if reason is not None:
            self._scheduler.end(sequence)
        else:
            try:
                self._update_mask(sequence, accept=sampled.token_id)
            except ExoKimiError as error:
                self._counters.failed += 1
                self._end_with(sequence, error)
                return
        event = TokenEvent(
            token_id=sampled.token_id,
            logprob=sampled.logprob,
            top_logprobs=sampled.top_logprobs,
            finish_reason=reason,
            cached_tokens=sequence.cached_tokens or 0,
            queue_s=sequence.queue_s or 0.0,
            accepted_drafts=sequence.accepted_drafts,
            rejected_drafts=sequence.rejected_drafts,
        )
        self._streams[sequence].put_nowait(event)

    def _update_mask(self, sequence: Sequence, *, accept: int | None = None) -> None:
        if sequence.request.constraint is not None:
            vocab_size = self._limits.vocab_size if self._limits else None
            sequence.mask = _next_mask(sequence.request.constraint, accept=accept, vocab_size=vocab_size)

    def _mask_proposal(self, sequence: Sequence, constraint: TokenConstraint) -> None:
        """Cut guesses to what a grammar allows, and note what it allows after each of them."""
        vocab_size = self._limits.vocab_size if self._limits else None
        masks = _masks_along(constraint, sequence.mask, sequence.proposed, vocab_size=vocab_size)
        sequence.proposed = sequence.proposed[: len(masks)]
        masked = sequence.mask is not None or any(mask is not None for mask in masks)
        sequence.proposed_masks = tuple(masks) if masked else ()

    def _fail(self, fault: RuntimeFault) -> None:
        """The stages lost their sequences: those that had touched them wait to be fed again, or end."""
        survivors = 0
        for sequence, in_flight in self._scheduler.fail():
            if self._survival.interrupt(sequence, fault, in_flight=in_flight):
                survivors += 1
            else:
                self._counters.failed += 1
                self._end_with(sequence, copy.copy(fault))
        self._survival.on_away(fault)
        if survivors:
            self._counters.note(f"{survivors} requests wait for the stages, and then go on")

    def _fail_epoch(self, epoch: int, fault: RuntimeFault) -> None:
        if epoch == self._scheduler.epoch:
            self._fail(fault)

    def _give_up_on(self, sequence: Sequence) -> None:
        """An interrupted sequence waits no longer."""
        if sequence.interruption is not None:
            self._counters.failed += 1
            self._end_with(sequence, copy.copy(sequence.interruption.fault))

    def _refuse(self, fault: RuntimeFault) -> None:
        """The stages may not come back: refuse new requests, and end those that wait, but for what was interrupted, which
        has its time."""
        self._down = fault
        for sequence in list(self._scheduler.waiting):
            if sequence.interruption is None:
                self._counters.failed += 1
                self._end_with(sequence, copy.copy(fault))
        self._ready.set()

    def _stop(self, fault: RuntimeFault) -> None:
        """No stage will come back: end every request and refuse new ones."""
        self._scheduler.fail()
        self._survival.close()
        for sequence in self._scheduler.waiting:
            sequence.interruption = None
        self._refuse(fault)

    def _end_with(self, sequence: Sequence, error: ExoKimiError) -> None:
        self._scheduler.end(sequence)
        stream = self._streams.get(sequence)
        if stream is not None:
            stream.put_nowait(error)

    def _raise_if_down(self) -> None:
        if self._closed:
            raise EngineStoppedError("the server is shutting down")
        if self._down is not None:
            raise copy.copy(self._down)


def _log_end(sequence: Sequence, outcome: str) -> None:
    logger.info(
        "%s %s: %d prompt tokens (%d cached), %d generated, %.3f s in the queue",
        sequence.request.request_id,
        outcome,
        sequence.prompt_tokens,
        sequence.cached_tokens or 0,
        sequence.generated_tokens,
        sequence.queue_s or 0.0,
    )


def _next_mask(constraint: TokenConstraint, *, accept: int | None, vocab_size: int | None) -> bytes | None:
    """Advance a request's grammar by a token, if there is one, and ask what may follow. It is foreign code: whatever it raises
    must fail that request and no other.

    Args:
        constraint: the request's own.
        accept: the token that was just sampled; None before the first.
        vocab_size: rows of the model's head; None while it is not known.

    Returns:
        A mask that allows at least one token, or None when all are allowed.

    Raises:
        StageError: it raised, or it allows nothing.
    """
    try:
        if accept is not None:
            constraint.accept(accept)
        mask = constraint.mask()
    except ExoKimiError:
        raise
    except Exception as error:
        logger.exception("a request's grammar failed")
        raise StageError(f"the request's grammar failed: {type(error).__name__}: {error}") from error
    if mask is not None and not allowed(mask, len(mask) * 8 if vocab_size is None else vocab_size).any():
        raise StageError("the request's grammar allows no token")
    return mask


def _masks_along(
    constraint: TokenConstraint, mask: bytes | None, guesses: Iterable[int], *, vocab_size: int | None
) -> list[bytes | None]:
    """What a request's grammar allows after each guess, as far as it allows the guesses themselves.

    Args:
        constraint: the request's own, which is left where it is.
        mask: what it allows now.
        guesses: of what follows.
        vocab_size: see `_next_mask`.
    """
    found: list[bytes | None] = []
    if not isinstance(constraint, ForkableConstraint):
        return found
    try:
        fork = constraint.fork()
        for token_id in guesses:
            if mask is not None and not allowed(mask, len(mask) * 8)[token_id]:
                break
            mask = _next_mask(fork, accept=token_id, vocab_size=vocab_size)
            found.append(mask)
    except ExoKimiError as error:  # told when the tokens come to it
        logger.debug("guesses under a grammar end: %s", error)
    return found
