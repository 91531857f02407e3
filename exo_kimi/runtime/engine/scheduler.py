"""Who runs in the next step: a pure state machine, with no clock, no asyncio and no constraint in it.

Sequences that decode are dealt out over as many groups as there are stages, one group in flight per stage, so that no stage
idles while another works; what is left of a step's token budget goes to prefill chunks, which follow each other without
waiting for results. When the KV memory runs out, the youngest sequence gives its memory back and waits for another turn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import groupby
from operator import gt

import numpy as np

from exo_kimi.errors import ProtocolError
from exo_kimi.runtime.engine.admission import KvLedger, Limits
from exo_kimi.runtime.engine.prefix_cache import PrefixCache, PrefixOptions
from exo_kimi.runtime.engine.sequence import InFlight, ScheduledChunk, Sequence, StepOutcome
from exo_kimi.runtime.engine.speculation import Drafter
from exo_kimi.runtime.pipeline import Ready
from exo_kimi.runtime.steps import Blocks, Sampled, Step, StepResult


class Scheduler:
    """The sequences of one engine.

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
        self.epoch: int | None = None
        self.ledger: KvLedger | None = None
        self.prefixes = PrefixCache(prefixes)
        # Both by arrival, and who runs came before who waits: the head is let in first, the youngest gives way first.
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.prompt_tokens = 0  # done, each counted once
        self._decode_turns: deque[Sequence] = deque()
        self._in_flight: deque[InFlight] = deque()
        self._frees: list[int] = []
        self._next_seq_id = 0
        self._next_step_id = 0

    @property
    def steps_in_flight(self) -> int:
        """Steps sent and not yet answered."""
        return len(self._in_flight)

    def open(self, epoch: int, limits: Limits, ready: Ready | None = None) -> None:
        """The stages are ready and empty, but for their disks, of which `ready` tells."""
        self.epoch = epoch
        self.ledger = KvLedger(limits)
        self.prefixes.open(self.ledger, self._frees, ready)

    def fail(self) -> list[Sequence]:
        """The stages lost everything: no step until `open`. Ends and returns the sequences that touched the stages in
        this epoch; the others wait, also those that were admitted but not yet sent."""
        every = sorted((*self.running, *self.waiting), key=lambda s: s.order)
        touched = [s for s in every if s.epoch is not None and s.epoch == self.epoch]
        for sequence in every:
            sequence.state = "waiting"
            sequence.forget()
        for sequence in touched:
            sequence.state = "ended"
        self.waiting = [s for s in every if s.state == "waiting"]
        self.running.clear()
        self._decode_turns.clear()
        self._in_flight.clear()
        self._frees.clear()
        self.epoch = None
        self.ledger = None
        self.prefixes.close()
        return touched

    def add(self, sequence: Sequence) -> None:
        """Put a sequence in the queue."""
        self._enqueue(sequence)

    def end(self, sequence: Sequence) -> None:
        """A sequence is finished or cancelled: its memory is free for the next step, on every stage; idempotent."""
        if sequence.state == "running":
            self._release(sequence)
        elif sequence.state == "waiting":
            self.waiting.remove(sequence)
        sequence.state = "ended"

    def next_step(self, chunk: Callable[[list[Sequence]], int] | None = None) -> Step | None:
        """The next step to send; None while nothing can be sent before a result comes.

        Args:
            chunk: chooses `prefill_chunk` for those that run once the step has let in who fits; None leaves it.
        """
        if self.epoch is None or len(self._in_flight) >= self.stages:
            return None
        decodes = self._take_decodes()
        self._admit()
        if chunk is not None:
            self.prefill_chunk = chunk(self.running)
        self._draft(decodes)
        chunks = self._take_chunks(decodes)
        shares = [(s, 1) for s in decodes] + chunks
        restores = self.prefixes.restores(self.running)
        if not shares and not self._frees and not restores and not self.prefixes.has_orders:
            return None
        return self._send(shares, restores)

    def complete(self, result: StepResult) -> Iterator[StepOutcome]:
        """Take the answer of the oldest step in flight.

        Returns:
            The tokens of sequences that still want them, each appended when it is reached, to be read to the end. The
            caller ends a sequence whose `finish_reason` is not None, and sets its mask, before it reads on.

        Raises:
            ProtocolError: the answer is not the one that is due.
        """
        if not self._in_flight or self._in_flight[0].step_id != result.step_id or result.epoch != self.epoch:
            due = self._in_flight[0].step_id if self._in_flight else "no step"
            raise ProtocolError(
                "a result that is not due",
                expected=f"epoch {self.epoch}, step {due}",
                found=f"epoch {result.epoch}, step {result.step_id}",
            )
        step = self._in_flight.popleft()
        asked = [part for part in step.parts if part.sample]
        runs = [list(run) for _, run in groupby(result.sampled, key=lambda sampled: sampled.seq_id)]
        lengths = [1 + part.drafts for part in asked]
        if [part.seq_id for part in asked] != [run[0].seq_id for run in runs] or any(map(gt, map(len, runs), lengths)):
            raise ProtocolError(
                f"the result of step {step.step_id} is for other sequences",
                expected=[f"{part.seq_id} (at most {1 + part.drafts})" for part in asked],
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
                self.prefixes.restored(sequence, tokens)
        for part in step.parts:
            if part.sequence.seq_id == part.seq_id and part.sequence.state == "running":
                self.prompt_tokens += part.sequence.reached(part.end)
        if self.drafter is not None and asked:
            self.drafter.count(step, kept=len(result.sampled))
        return self._outcomes(asked, runs)

    def _outcomes(self, asked: list[ScheduledChunk], runs: list[list[Sampled]]) -> Iterator[StepOutcome]:
        for part, run in zip(asked, runs, strict=True):
            sequence = part.sequence
            sequence.sampling = False
            if sequence.state == "ended":
                continue
            # A sequence that was preempted meanwhile keeps the tokens: they are the same that it would draw again.
            for sampled in sequence.accept(run):
                yield StepOutcome(sequence=sequence, sampled=sampled)
            if sequence.state == "running":
                self._decode_turns.append(sequence)

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.state = "waiting"
        self.waiting.append(sequence)
        self.waiting.sort(key=lambda s: s.order)

    def _take_decodes(self) -> list[Sequence]:
        """The next group: an equal share of all that decode, those that waited longest first, each with its memory."""
        decoding = sum(s.decoding for s in self.running)
        share = -(-decoding // self.stages)
        group: list[Sequence] = []
        while self._decode_turns and len(group) < share:
            sequence = self._decode_turns.popleft()
            if not self._grow(sequence):
                continue  # it was the youngest, and gave up its own memory
            group.append(sequence)
        return [s for s in group if s.state == "running"]

    def _grow(self, sequence: Sequence) -> bool:
        """Reserve room for one more token, taking it from the youngest; False when that is the sequence itself."""
        assert self.ledger is not None
        while sequence.state == "running" and not self.ledger.reserve(sequence.seq_id, sequence.sent + 1):
            if not self.prefixes.evict_one():
                self._preempt(self.running[-1])
        return sequence.state == "running"

    def _draft(self, decodes: list[Sequence]) -> None:
        """Let the drafter put guesses on sequences of the group, in memory that is free, at most half of the step."""
        assert self.ledger is not None
        if self.drafter is None or not decodes:
            return
        filling = sum(s.pending for s in self.running if not s.decoding)
        room = self.prefill_chunk // 2 - len(decodes)
        self.drafter.draft(decodes, others=min(filling, self.prefill_chunk), room=room)
        for sequence in decodes:
            while sequence.drafts and not self.ledger.reserve(
                sequence.seq_id, sequence.sent + 1 + len(sequence.drafts)
            ):
                sequence.drafts = sequence.drafts[:-1]

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self._release(sequence)
        self._enqueue(sequence)

    def _release(self, sequence: Sequence) -> None:
        assert self.ledger is not None
        self.running.remove(sequence)
        if sequence in self._decode_turns:
            self._decode_turns.remove(sequence)
        self.prefixes.leave(sequence)
        sequence.forget()

    def _admit(self) -> None:
        """Let the head of the queue in while it fits; nobody overtakes it."""
        assert self.ledger is not None
        while self.waiting and len(self.running) < self.max_running:
            sequence = self.waiting[0]
            # A preempted sequence whose last token is still on its way waits for it.
            needed = self.ledger.limits.rounded(len(sequence.tokens))
            if sequence.sampling or not self.prefixes.make_room(sequence, needed + self._growth()):
                return
            self.waiting.pop(0)
            sequence.state = "running"
            sequence.seq_id = self._next_seq_id
            self._next_seq_id += 1
            self.prefixes.enter(sequence)
            self.ledger.reserve(sequence.seq_id, len(sequence.tokens))
            self.running.append(sequence)

    def _growth(self) -> int:
        """Room for the next growth of all that run, kept free so that admitting one does not preempt another at once."""
        assert self.ledger is not None
        step = self.ledger.limits.cache_step
        return sum(min(step, self.ledger.missing(s.seq_id, s.final_cache_tokens)) for s in self.running)

    def _take_chunks(self, decodes: list[Sequence]) -> list[tuple[Sequence, int]]:
        """Prefill chunks, oldest first; the oldest leaves up to half of the budget to those behind it."""
        budget = max(self.prefill_chunk - sum(1 + len(s.drafts) for s in decodes), -(-self.prefill_chunk // 4))
        filling = [s for s in self.running if not s.decoding and self.prefixes.chosen(s, self.running)]
        chunks: list[tuple[Sequence, int]] = []
        for position, sequence in enumerate(filling):
            behind = sum(s.pending for s in filling[position + 1 :]) if position == 0 else 0
            length = min(sequence.pending, max(budget - behind, -(-budget // 2)) if position == 0 else budget)
            if length <= 0:
                break
            chunks.append((sequence, length))
            budget -= length
        return chunks

    def _send(self, shares: list[tuple[Sequence, int]], restores: dict[Sequence, Blocks]) -> Step:
        assert self.epoch is not None
        step_id = self._next_step_id
        self._next_step_id += 1
        beginning = [sequence for sequence in (*restores, *(s for s, _ in shares)) if not sequence.begun]
        begin = tuple(sequence.begin(self.epoch) for sequence in beginning)
        for sequence in beginning:
            self.prefixes.began(sequence)
        tokens = [token for sequence, length in shares for token in sequence.next_tokens(length)]
        taken = [sequence.take(length) for sequence, length in shares]
        cached = sum(segment.offset + segment.length for segment, _ in taken)
        parts = tuple(part for _, part in taken)
        for part in parts:
            if part.sample and part.end == len(part.sequence.tokens) and part.sequence.generated_tokens == 0:
                self.prefixes.filled(part.sequence)
        self._in_flight.append(
            InFlight(
                step_id=step_id,
                parts=parts,
                tokens=len(tokens),
                cached_tokens=cached,
                restores=tuple((sequence, sequence.seq_id) for sequence in restores),
            )
        )
        store, drop = self.prefixes.disk_orders(busy=bool(shares))
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
        )
