"""Scheduler: which sequences run in the next step, and with how many tokens. A state machine without a clock and without asyncio.

Sequences that decode are dealt out over as many groups as there are stages, one group in flight per stage, so that no stage
idles while another works; what is left of a step's token budget goes to prefill chunks, which follow each other without
waiting for results. When the KV memory runs out, the youngest sequence is preempted: it gives its memory back and waits for
another turn.

    Scheduler        as long as the engine lives: the waiting queue, and totals
    EpochScheduler   from a Ready to the next Failed: running sequences, KV memory, prefixes, steps in flight
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count, groupby
from operator import attrgetter, gt

import numpy as np

from exo_kimi.errors import ExpertReadError, ProtocolError
from exo_kimi.runtime.engine.admission import KvLedger, Limits
from exo_kimi.runtime.engine.kept_caches import KnownCaches
from exo_kimi.runtime.engine.prefix_cache import PrefixCache, PrefixCounts, PrefixOptions
from exo_kimi.runtime.engine.sequence import ScheduledChunk, Sequence, StepInFlight, StepOutcome
from exo_kimi.runtime.engine.speculation import Drafter
from exo_kimi.runtime.pipeline import DiskBlocks, Ready
from exo_kimi.runtime.steps import Blocks, Proposal, Sampled, Step, StepResult

_by_arrival = attrgetter("order")


@dataclass(slots=True, kw_only=True)
class SchedulerCounts:
    """Totals since the start. `prompt_tokens` are those that the last stage has in its cache, each counted once."""

    preemptions: int = 0
    prompt_tokens: int = 0
    prefixes: PrefixCounts = field(default_factory=PrefixCounts)


class Scheduler:
    """The sequences of one engine, through all epochs of its stages.

    Args:
        stages: steps that may be in flight.
        prefill_chunk: tokens of a step. Decoding goes first and is never cut; prefill takes what is left, but at least a
            quarter of it, so that neither starves the other.
        max_running: most sequences with caches at a time.
        drafter: guesses what sequences that decode go on with; None does not.
        prefixes: what is kept of sequences that ended; None keeps nothing.
    """

    def __init__(
        self,
        *,
        stages: int,
        prefill_chunk: int,
        max_running: int,
        drafter: Drafter | None = None,
        prefixes: PrefixOptions | None = None,
    ) -> None:
        self.stages = stages
        self.prefill_chunk = prefill_chunk
        self.max_running = max_running
        self.drafter = drafter
        self.counts = SchedulerCounts()
        self.waiting: list[Sequence] = []
        """By arrival: the head is let in first."""
        self.current: EpochScheduler | None = None
        """What runs; None while the stages are not ready."""
        self._prefixes = prefixes
        self._known: list[KnownCaches] = []
        # Of all epochs, so that nothing late is taken for something new.
        self._seq_ids = count()
        self._step_ids = count()

    @property
    def epoch(self) -> int | None:
        """The stages' epoch; None while they are not ready."""
        return self.current.epoch if self.current is not None else None

    @property
    def running(self) -> list[Sequence]:
        """Sequences with caches, by arrival."""
        return self.current.running if self.current is not None else []

    def open(self, ready: Ready, limits: Limits) -> int:
        """The stages are ready, and hold what is on their disks and what they kept of the epoch before.

        Returns:
            Of how many tokens all of them kept the caches.
        """
        ledger, frees = KvLedger(limits), list[int]()
        self.current = EpochScheduler(
            ready.epoch,
            stages=self.stages,
            max_running=self.max_running,
            waiting=self.waiting,
            ledger=ledger,
            prefixes=PrefixCache(
                self._prefixes,
                ledger,
                frees,
                ready,
                self.counts.prefixes,
                held_back=1 if self.drafter is not None and self.drafter.head is not None else 0,
            ),
            frees=frees,
            drafter=self.drafter,
            counts=self.counts,
            seq_ids=self._seq_ids,
            step_ids=self._step_ids,
        )
        known, self._known = self._known, []
        return self.current.prefixes.adopt(known, ready.held)

    def fail(self) -> list[tuple[Sequence, bool]]:
        """The stages lost every sequence: no step until `open`, and all of them wait.

        Returns:
            The sequences that touched the stages in this epoch, by arrival, and whether each was part of a step in flight.
        """
        every = [*self.running, *self.waiting]
        every.sort(key=_by_arrival)
        in_flight = self.current.sequences_in_flight() if self.current is not None else set()
        if self.current is not None:
            self._known = list(self.current.known_caches())
        touched = [(s, s in in_flight) for s in every if s.epoch is not None and s.epoch == self.epoch]
        for sequence in every:
            sequence.state = "waiting"
            sequence.awaiting_token = False
            sequence.forget()
        self.waiting = every
        self.current = None
        return touched

    def add(self, sequence: Sequence) -> None:
        """Put a sequence in the waiting queue."""
        sequence.state = "waiting"
        insort(self.waiting, sequence, key=_by_arrival)

    def end(self, sequence: Sequence) -> None:
        """A sequence is finished or cancelled: its memory is free for the next step, on every stage; idempotent."""
        if sequence.state == "running" and self.current is not None:
            self.current.release(sequence)
        elif sequence.state == "waiting":
            self.waiting.remove(sequence)
        sequence.state = "ended"

    def next_step(self, choose_budget: Callable[[list[Sequence]], int] | None = None) -> Step | None:
        """The next step to send; None while nothing can be sent before a result comes.

        Args:
            choose_budget: the step's token budget, for the sequences that run once the step has let in who fits; None takes
                `prefill_chunk`.
        """
        if self.current is None:
            return None
        return self.current.next_step(choose_budget or (lambda _: self.prefill_chunk))

    def complete(self, result: StepResult) -> Iterator[StepOutcome]:
        """Take the answer of the oldest step in flight.

        Returns:
            The tokens of sequences that still want them, each appended when it is reached, to be read to the end. The
            caller ends a sequence whose `finish_reason` is not None, and sets its mask, before it reads on.

        Raises:
            ProtocolError: the answer is not the one that is due.
        """
        if self.current is None:
            raise _not_due(result, None, "no step")
        return self.current.complete(result)

    def failures(self, result: StepResult) -> list[tuple[Sequence, ExpertReadError]]:
        """Sequences that a stage cannot go on with, each with the reason; the caller ends them. Call it after `complete`."""
        return [] if self.current is None or not result.failed else self.current.failures(result)

    def on_disk_blocks(self, event: DiskBlocks) -> None:
        """A stage's disk changed."""
        if self.current is not None:
            self.current.prefixes.on_disk_blocks(event)


class EpochScheduler:
    """What runs while the stages are ready; made by Scheduler.open, and given up with all caches when they fail.

    Args:
        epoch: of the stages.
        stages: steps that may be in flight.
        max_running: most sequences with caches at a time.
        waiting: the Scheduler's queue, which both change.
        ledger: KV memory of the stages.
        prefixes: what is cached of sequences that ended.
        frees: names of caches to drop with the next step; `prefixes` appends to it.
        drafter: see Scheduler.
        counts: the Scheduler's.
        seq_ids, step_ids: names that were not used yet.
    """

    def __init__(
        self,
        epoch: int,
        *,
        stages: int,
        max_running: int,
        waiting: list[Sequence],
        ledger: KvLedger,
        prefixes: PrefixCache,
        frees: list[int],
        drafter: Drafter | None,
        counts: SchedulerCounts,
        seq_ids: Iterator[int],
        step_ids: Iterator[int],
    ) -> None:
        self.epoch = epoch
        self.ledger = ledger
        self.prefixes = prefixes
        # By arrival: the youngest is preempted first.
        self.running: list[Sequence] = []
        self.in_flight: deque[StepInFlight] = deque()
        self._stages = stages
        self._max_running = max_running
        self._waiting = waiting
        self._frees = frees
        self._drafter = drafter
        self._counts = counts
        self._seq_ids = seq_ids
        self._step_ids = step_ids
        self._decode_turns: deque[Sequence] = deque()
        self._failed: set[int] = set()
        """Names of sequences that a stage could not go on with."""

    def next_step(self, choose_budget: Callable[[list[Sequence]], int]) -> Step | None:
        """See Scheduler.next_step."""
        if len(self.in_flight) >= self._stages:
            return None
        decodes = self._take_decodes()
        self._admit()
        token_budget = choose_budget(self.running)
        self._draft(decodes, token_budget)
        scheduled = [(s, 1) for s in decodes] + self._take_chunks(decodes, token_budget)
        if self._drafter is not None:
            sampling = [s for s, length in scheduled if length == s.num_new_tokens]
            self._drafter.propose(sampling, others=sum(length for _, length in scheduled) - len(sampling))
        restores = self.prefixes.restore_orders(self.running)
        if not scheduled and not self._frees and not restores and not self.prefixes.has_orders:
            return None
        return self._make_step(scheduled, restores)

    def complete(self, result: StepResult) -> Iterator[StepOutcome]:
        """See Scheduler.complete."""
        due = self.in_flight[0].step_id if self.in_flight else "no step"
        if due != result.step_id or result.epoch != self.epoch:
            raise _not_due(result, self.epoch, due)
        step = self.in_flight.popleft()
        failed = {one.seq_id for one in result.failed}
        chunks = [chunk for chunk in step.chunks if chunk.seq_id not in failed]
        for chunk in step.chunks:
            if chunk.seq_id in failed and chunk.sample:
                chunk.sequence.awaiting_token = False  # it will not come
        asked = [chunk for chunk in chunks if chunk.sample]
        runs = [list(run) for _, run in groupby(result.sampled, key=lambda sampled: sampled.seq_id)]
        lengths = [1 + chunk.drafts for chunk in asked]
        if [chunk.seq_id for chunk in asked] != [run[0].seq_id for run in runs] or any(
            map(gt, map(len, runs), lengths)
        ):
            raise ProtocolError(
                f"the result of step {step.step_id} is for other sequences",
                expected=[f"{chunk.seq_id} (at most {1 + chunk.drafts})" for chunk in asked],
                found=[sampled.seq_id for sampled in result.sampled],
            )
        if [seq_id for _, seq_id in step.restores] != [seq_id for seq_id, _ in result.restored]:
            raise ProtocolError(
                f"the result of step {step.step_id} is not about the sequences that were restored",
                expected=[seq_id for _, seq_id in step.restores],
                found=[seq_id for seq_id, _ in result.restored],
            )
        for (sequence, seq_id), (_, tokens) in zip(step.restores, result.restored, strict=True):
            if sequence.seq_id == seq_id:
                self.prefixes.on_restored(sequence, tokens)
        for chunk in chunks:
            if chunk.sequence.seq_id == chunk.seq_id and chunk.sequence.state == "running":
                self._counts.prompt_tokens += chunk.sequence.reached(chunk.end)
        if self._drafter is not None and asked and not failed:
            proposed = sum(len(proposal.token_ids) for proposal in result.proposals)
            self._drafter.count(step, kept=[*map(len, runs)], proposed=proposed)
        return self._outcomes(asked, runs, {proposal.seq_id: proposal for proposal in result.proposals})

    def sequences_in_flight(self) -> set[Sequence]:
        """Those with tokens in a step that was not answered, or that read from disk in it."""
        chunks = {chunk.sequence for step in self.in_flight for chunk in step.chunks}
        return chunks | {sequence for step in self.in_flight for sequence, _ in step.restores}

    def known_caches(self) -> Iterator[KnownCaches]:
        """What the stages hold, or some of them, that another sequence may begin from: what is used now comes last."""
        yield from self.prefixes.known()
        for sequence in self.running:
            if sequence.damaged or not sequence.request.use_prefix_cache:
                continue
            tokens, reserved = sequence.prefix_ids(-1), self.ledger.held(sequence.seq_id)
            source, before = sequence.source, None
            if source is not None and source.move:
                before = KnownCaches(seq_id=source.seq_id, tokens=tokens[: source.tokens], reserved_tokens=reserved)
            if sequence.registered:
                yield KnownCaches(seq_id=sequence.seq_id, tokens=tokens, reserved_tokens=reserved, before=before)
            elif before is not None:
                yield before

    def failures(self, result: StepResult) -> list[tuple[Sequence, ExpertReadError]]:
        """See Scheduler.failures. One that only began from the caches of another that failed is not told: it begins again."""
        errors = {one.seq_id: one.error() for one in result.failed}
        self._failed |= errors.keys()
        found = [sequence for sequence in self.running if sequence.seq_id in errors]
        for sequence in found:
            sequence.damaged = True
        self.prefixes.drop_damaged(errors)
        heirs = [each for each in found if each.source is not None and each.source.seq_id in self._failed]
        for sequence in heirs:
            self.preempt(sequence)
        return [(sequence, errors[sequence.seq_id]) for sequence in found if sequence not in heirs]

    def _outcomes(
        self, asked: list[ScheduledChunk], runs: list[list[Sampled]], proposals: dict[int, Proposal]
    ) -> Iterator[StepOutcome]:
        for chunk, run in zip(asked, runs, strict=True):
            sequence = chunk.sequence
            sequence.awaiting_token = False
            if sequence.state == "ended":
                continue
            sequence.rejected_drafts += chunk.drafts - (len(run) - 1)
            head = self._drafter.head if self._drafter is not None else None
            if head is not None and chunk.of_head:
                head.on_verified(sequence.head, drafts=chunk.drafts, accepted=len(run) - 1)
            # A sequence that was preempted meanwhile keeps the tokens: they are the same that it would draw again.
            known = len(sequence.tokens) + len(run)
            for sampled in sequence.accept(run, masked=chunk.masked):
                yield StepOutcome(sequence=sequence, sampled=sampled)
            if sequence.state == "running":
                self._decode_turns.append(sequence)
                proposal = proposals.get(chunk.seq_id)
                if head is not None and proposal is not None and sequence.seq_id == chunk.seq_id:
                    head.on_proposal(sequence.head, proposal)
                    if len(sequence.tokens) == known:  # or it is about tokens that were dropped
                        sequence.take_proposal(proposal.token_ids)

    def _take_decodes(self) -> list[Sequence]:
        """The next group: an equal share of all that decode, those that waited longest first, each with its memory."""
        decoding = sum(s.decoding for s in self.running)
        share = -(-decoding // self._stages)
        group: list[Sequence] = []
        while self._decode_turns and len(group) < share:
            sequence = self._decode_turns.popleft()
            if not self._grow(sequence):
                continue  # it was the youngest, and gave up its own memory
            group.append(sequence)
        return [s for s in group if s.state == "running"]

    def _grow(self, sequence: Sequence) -> bool:
        """Reserve room for one more token, taking it from the youngest; False when that is the sequence itself."""
        while sequence.state == "running" and not self.ledger.reserve(
            sequence.seq_id, sequence.num_computed_tokens + 1
        ):
            if not self.prefixes.evict_one() and not self.prefixes.forget_snapshot():
                self.preempt(self.running[-1])
        return sequence.state == "running"

    def _draft(self, decodes: list[Sequence], token_budget: int) -> None:
        """Let the drafter put guesses on sequences of the group, in memory that is free, at most half of the step."""
        if self._drafter is None or not decodes:
            return
        filling = sum(s.num_new_tokens for s in self.running if not s.decoding)
        room = token_budget // 2 - len(decodes)
        self._drafter.draft(decodes, others=min(filling, token_budget), room=room)
        for sequence in decodes:
            while sequence.drafts and not self.ledger.reserve(
                sequence.seq_id, sequence.num_computed_tokens + 1 + len(sequence.drafts)
            ):
                sequence.drafts, sequence.draft_masks = sequence.drafts[:-1], sequence.draft_masks[:-1]

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's memory; it waits for another turn, and keeps its tokens."""
        self._counts.preemptions += 1
        self.release(sequence)
        sequence.state = "waiting"
        insort(self._waiting, sequence, key=_by_arrival)

    def release(self, sequence: Sequence) -> None:
        """A sequence stops running: its caches are kept as a prefix, or dropped with the next step."""
        self.running.remove(sequence)
        if sequence in self._decode_turns:
            self._decode_turns.remove(sequence)
        self.prefixes.release(sequence)
        sequence.forget()

    def _admit(self) -> None:
        """Let the head of the queue in while it fits; nobody overtakes it, but for those that are to run alone."""
        while self._waiting and len(self.running) < self._max_running:
            if any(sequence.runs_alone for sequence in self.running):
                return
            sequence = next((s for s in self._waiting if s.runs_alone), self._waiting[0])
            # A preempted sequence whose last token is still on its way waits for it.
            needed = self.ledger.limits.rounded(len(sequence.tokens))
            if sequence.awaiting_token or not self.prefixes.make_room(sequence, needed + self._growth()):
                return
            self._waiting.remove(sequence)
            sequence.state = "running"
            sequence.seq_id = next(self._seq_ids)
            self.prefixes.take_over(sequence)
            self.ledger.reserve(sequence.seq_id, len(sequence.tokens))
            insort(self.running, sequence, key=_by_arrival)

    def _growth(self) -> int:
        """Room for the next growth of all that run, kept free so that admitting one does not preempt another at once."""
        step = self.ledger.limits.cache_step
        return sum(min(step, self.ledger.missing(s.seq_id, s.final_cache_tokens)) for s in self.running)

    def _take_chunks(self, decodes: list[Sequence], token_budget: int) -> list[tuple[Sequence, int]]:
        """Prefill chunks, oldest first; the oldest leaves up to half of the budget to those behind it."""
        budget = max(token_budget - sum(1 + len(s.drafts) for s in decodes), -(-token_budget // 4))
        filling = [s for s in self.running if not s.decoding and self.prefixes.choose_start(s, self.running)]
        chunks: list[tuple[Sequence, int]] = []
        for position, sequence in enumerate(filling):
            behind = sum(s.num_new_tokens for s in filling[position + 1 :]) if position == 0 else 0
            length = min(sequence.num_new_tokens, max(budget - behind, -(-budget // 2)) if position == 0 else budget)
            if length <= 0:
                break
            length = sequence.until_snapshot(length)
            chunks.append((sequence, length))
            budget -= length
        return chunks

    def _make_step(self, scheduled: list[tuple[Sequence, int]], restores: dict[Sequence, Blocks]) -> Step:
        step_id = next(self._step_ids)
        beginning = [sequence for sequence in (*restores, *(s for s, _ in scheduled)) if not sequence.registered]
        for sequence in beginning:
            self.prefixes.on_begin(sequence)
        tokens = [token for sequence, length in scheduled for token in sequence.next_tokens(length)]
        kept = [self.prefixes.keep_states(sequence, length, beginning) for sequence, length in scheduled]
        begin = tuple(sequence.begin(self.epoch) for sequence in beginning)
        taken = [
            sequence.take(length, snapshot=snapshot)
            for (sequence, length), snapshot in zip(scheduled, kept, strict=True)
        ]
        cached = sum(segment.offset + segment.length for segment, _ in taken)
        pictures = {
            picture.digest: picture
            for segment, chunk in taken
            if segment.pictures
            for picture in chunk.sequence.pictures_of(segment)
        }
        chunks = tuple(chunk for _, chunk in taken)
        for chunk in chunks:
            if chunk.sample and chunk.end == len(chunk.sequence.tokens) and chunk.sequence.generated_tokens == 0:
                self.prefixes.on_prompt_sent(chunk.sequence)
        self.in_flight.append(
            StepInFlight(
                step_id=step_id,
                chunks=chunks,
                tokens=len(tokens),
                cached_tokens=cached,
                restores=tuple((sequence, sequence.seq_id) for sequence in restores),
            )
        )
        store, drop = self.prefixes.disk_orders(busy=bool(scheduled))
        frees = tuple(self._frees)
        self._frees.clear()
        return Step(
            epoch=self.epoch,
            step_id=step_id,
            segments=tuple(segment for segment, _ in taken),
            tokens=np.array(tokens, np.int32),
            begin=begin,
            free=frees,
            restore=tuple(restores.values()),
            store=store,
            drop=drop,
            forget=self.prefixes.take_forgotten(),
            pictures=tuple(pictures.values()),
        )


def _not_due(result: StepResult, epoch: int | None, due: int | str) -> ProtocolError:
    return ProtocolError(
        "a result that is not due",
        expected=f"epoch {epoch}, step {due}",
        found=f"epoch {result.epoch}, step {result.step_id}",
    )
