"""Speculation: draft tokens from each sequence's own past and from a draft head, as many as pay for the bytes they read.

What the past says goes first where it is at least as likely; a head's guesses come with the answer before (`steps.Proposal`), so
neither takes a way of its own. The last stage verifies them (`stage.sampling`), so they change no token. Three parts, from the
top down: the Drafter puts draft tokens on the sequences of a step and counts what came of them; `choose_drafts` weighs chances
against bytes; PromptLookup finds what may follow.

Decoding is bound by the bytes that a step reads. What all tokens share is read once, but a mixture of experts reads more
experts for every further token, so a guess costs bytes whether it is right or not.

Source: prompt lookup decoding, Saxena 2023; going on inside what is being copied as LZ77 does, Ziv and Lempel 1977.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from exo_kimi.arch.geometry import kv_bytes_per_token, mean_routed_experts
from exo_kimi.checkpoint.drafts.manifest import DraftManifest
from exo_kimi.checkpoint.manifest import StageManifest
from exo_kimi.planner.search.laws import attention_flops
from exo_kimi.planner.weights.bytes import ModelBytes
from exo_kimi.runtime.engine.draft_policy import MOST_HEAD_DRAFTS, DraftTokens, HeadPolicy, guess_bytes, lost_steps
from exo_kimi.runtime.requests import StageHealth

if TYPE_CHECKING:
    from exo_kimi.runtime.engine.sequence import ScheduledChunk, Sequence, StepInFlight

Speculate = Literal["off", "auto"] | int
BYTES_PER_FLOP = 819e9 / 2.08e13
"""Bytes that an M3 Ultra reads in the time of one floating-point operation; other Macs' ratios are within a half of it. Source:
`planner/profiles/m3-ultra.toml`."""
MEMORY_BYTES_PER_S = 819e9
"""Of an M3 Ultra. Source: as of BYTES_PER_FLOP."""
OVERHEAD_S_PER_LAYER = 3.17e-4
"""Launches and synchronisation of a layer's step on an M3 Ultra. Source: as of BYTES_PER_FLOP."""
MAX_DRAFTS = 8
"""Guesses of one sequence in a step, by default."""
MAX_STEP_DRAFTS = 64
"""Of all sequences: the last stage holds a row of logits for each, 0.65 MB for K2."""
NGRAM = 3
"""Tokens that must have stood together before."""
PRIOR = 0.25
"""Chance of a guess while nothing is known, worth one observation: low enough that nothing is sent on hope."""
KEEP = 0.97
"""Weight of an observation after each newer one: the last thirty or so count."""
COPYING = 4
"""Tokens that the past said right in a row, from which on a head is not asked beside it."""
_CLASSES = 4  # by tokens guessed right in a row: 0, 1-2, 3-6, more
_BITS = 20
_MASK = (1 << _BITS * NGRAM) - 1


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
    """Puts draft tokens on the sequences of a step, and counts what came of them.

    Args:
        step_bytes: what steps read.
        limit: guesses of one sequence in a step at most.
        always: send what there is to guess, whatever the bytes say.
        disk_cost: what a byte of a routed expert costs on top where experts are read from disk, see `disk_cost_of`.
        lookups: whether to guess from the past.
        step_s: what the step took whose answer is being taken, see `PrefillPacer.answered`; None where nobody looked.
        head: of a draft head on the last stage; None without one.
    """

    step_bytes: StepBytes
    limit: int = MAX_DRAFTS
    always: bool = False
    disk_cost: float = 0.0
    lookups: bool = True
    step_s: float | None = None
    head: HeadPolicy | None = None
    counts: DraftCounts = field(default_factory=DraftCounts)

    @classmethod
    def of(cls, speculate: Speculate, model: ModelBytes, *, head: HeadPolicy | None = None) -> Drafter | None:
        """What an option asks for: `off`, `auto` where bytes say so, or a number of guesses whatever they say."""
        step_bytes = step_bytes_of(model)
        if head is not None:
            step_bytes = replace(step_bytes, overhead_bytes=model.layers * OVERHEAD_S_PER_LAYER * MEMORY_BYTES_PER_S)
        if speculate in ("off", 0):
            return None if head is None else cls(step_bytes=step_bytes, lookups=False, head=head)
        if isinstance(speculate, int):
            return cls(step_bytes=step_bytes, limit=speculate, always=True, head=head)
        return cls(step_bytes=step_bytes, head=head)

    @classmethod
    def of_stage(cls, manifest: StageManifest, head: DraftManifest, tokens: DraftTokens) -> Drafter:
        """For a leader that has the headers of its own layers only: all layers are taken to be as those are.

        Args:
            manifest: of its layers.
            head: the draft head.
            tokens: see `HeadPolicy.of`.
        """
        config, layers = manifest.config, manifest.config.num_hidden_layers
        whole = layers / (manifest.end_layer - manifest.start_layer)
        sizes = {"experts": 0, "other": 0}
        for source in manifest.sources:
            if source.spec.layer is not None:
                sizes["experts" if source.spec.kind == "experts" else "other"] += source.resident_bytes
        step_bytes = StepBytes(
            shared_bytes=round(sizes["other"] * whole),
            expert_bytes=round(sizes["experts"] * whole),
            experts=mean_routed_experts(config),
            experts_per_token=config.num_experts_per_tok,
            kv_token_bytes=kv_bytes_per_token(config, 0, layers, bytes_per_element=2),
            attention_bytes=sum(attention_flops(config, layer, 1) for layer in range(layers)) * BYTES_PER_FLOP,
            overhead_bytes=layers * OVERHEAD_S_PER_LAYER * MEMORY_BYTES_PER_S,
        )
        return cls(step_bytes=step_bytes, head=HeadPolicy.of(tokens, draft_bytes=guess_bytes(head, 0)))

    def draft(self, sequences: Ordered[Sequence], *, others: int, room: int) -> None:
        """Set `drafts` of each sequence.

        Args:
            sequences: that decode together, each with its newest token.
            others: tokens of other sequences in the step.
            room: for guesses, in tokens.
        """
        guesses = [self._guess(sequence) for sequence in sequences]
        room = min(room, MAX_STEP_DRAFTS)
        for sequence in sequences:
            sequence.drafts, sequence.draft_masks = (), ()
        if room <= 0 or not any(guess for guess, _ in guesses):
            return
        cached = sum(sequence.num_computed_tokens + 1 for sequence in sequences)
        chances = [chance for _, chance in guesses]
        if self.head is not None and len(sequences) + others == 1 and sequences[0].drafts_of_head:
            counts = [min(room, len(chances[0]))]  # weighed when they were asked for
        else:
            counts = choose_drafts(
                chances,
                lambda tokens: self.step_bytes.cost(
                    tokens, sequences=len(sequences), cached_tokens=cached, disk_cost=self.disk_cost
                ),
                others=others,
                room=room,
            )
        for sequence, (guess, _), count in zip(sequences, guesses, counts, strict=True):
            sequence.drafts = tuple(guess[:count])
            if sequence.proposed_masks and sequence.proposed[:count] == sequence.drafts:
                sequence.draft_masks = sequence.proposed_masks[:count]

    def propose(self, sequences: Ordered[Sequence], *, others: int) -> None:
        """Set how many guesses the head is asked for of each sequence that gets a token with the next step.

        Args:
            sequences: with their drafts for that step.
            others: tokens of other sequences in the step.
        """
        head = self.head
        if head is None:
            return
        # The step after this one is taken to be like it: as many sequences, and as many guesses as are asked for now.
        cached = sum(sequence.num_computed_tokens + 1 for sequence in sequences)
        asked = sum(sequence.head.wanted for sequence in sequences)
        expected = {id(s): sum(head.chances(s.head, s.head.wanted), 1.0) for s in sequences}
        total = sum(expected.values())
        for sequence in sequences:
            tokens = len(sequences) + others + asked - sequence.head.wanted
            costs = self._head_costs(head, tokens, sequences=len(sequences), cached_tokens=cached)
            most = sequence.max_new_tokens - sequence.generated_tokens - 2
            count = head.choose(sequence.head, most=most, costs=costs, others=total - expected[id(sequence)])
            measures = tokens == 1 and head.wants_plain
            sequence.propose = 0 if measures or self._is_copying(sequence) else count

    def _head_costs(self, head: HeadPolicy, tokens: int, *, sequences: int, cached_tokens: int) -> list[float]:
        """What a step takes in which a sequence has 0, 1 ... guesses of the head, and asks for as many: as timed, or as counted.

        Args:
            head: what was timed.
            tokens: of the step without these guesses; 1 of a sequence alone.
            sequences, cached_tokens: of the step.
        """
        counted = [
            count * head.draft_bytes
            + self.step_bytes.cost(
                tokens + count, sequences=sequences, cached_tokens=cached_tokens, disk_cost=self.disk_cost
            )
            for count in range(MOST_HEAD_DRAFTS + 1)
        ]
        return head.times.alone(counted) if tokens == 1 else head.times.line.at(counted)

    def _is_copying(self, sequence: Sequence) -> bool:
        """The past says what follows, and has been right for long: the head has nothing to add."""
        return sequence.lookup is not None and sequence.lookup.run >= COPYING and bool(sequence.drafts)

    def count(self, step: StepInFlight, *, kept: Ordered[int], proposed: int = 0) -> None:
        """A step was answered.

        Args:
            step: with the chunks that asked for a token.
            kept: tokens of each of them; the first of an answer is prefill's.
            proposed: guesses of the head for the step after it.
        """
        asked = [(chunk, tokens) for chunk, tokens in zip(step.asked, kept, strict=True)]
        decoding = [(chunk, tokens) for chunk, tokens in asked if chunk.end > chunk.sequence.prompt_tokens]
        if not decoding:
            return
        tokens = sum(kept) - (len(asked) - len(decoding))
        drafts = sum(chunk.drafts for chunk in step.chunks)
        if self.head is not None:
            self._count_head(self.head, step, decoding, drafts=drafts, proposed=proposed)
        read = self.step_bytes.read(step.tokens, cached_tokens=step.cached_tokens)
        plain = self.step_bytes.read(step.tokens - drafts, cached_tokens=step.cached_tokens - drafts)
        self.counts.drafted += drafts
        self.counts.accepted += tokens - len(decoding)
        self.counts.read_bytes += read + (0.0 if self.head is None else proposed * self.head.draft_bytes)
        self.counts.plain_bytes += plain * tokens / len(decoding)

    def _count_head(
        self,
        head: HeadPolicy,
        step: StepInFlight,
        decoding: Ordered[tuple[ScheduledChunk, int]],
        *,
        drafts: int,
        proposed: int,
    ) -> None:
        """What a step took, and what the head's guesses in it won and lost."""
        of_head = sum(chunk.drafts for chunk, _ in decoding if chunk.of_head)
        plain_tokens = step.tokens - drafts
        counted = self.step_bytes.cost(
            step.tokens, sequences=len(decoding), cached_tokens=step.cached_tokens, disk_cost=self.disk_cost
        )
        if self.step_s is not None and step.tokens == len(decoding) + drafts:
            head.times.line.note(counted + proposed * head.draft_bytes, self.step_s)
            if len(decoding) == 1 and drafts == of_head:
                head.times.note(drafts, self.step_s, proposed=proposed)
        costs = self._head_costs(head, plain_tokens, sequences=len(decoding), cached_tokens=step.cached_tokens)
        for chunk, tokens in decoding:
            guesses = min(chunk.drafts, MOST_HEAD_DRAFTS) if chunk.of_head else 0
            lost = lost_steps(costs, guesses, plain_tokens - 1.0)
            head.on_step(chunk.sequence.head, won=tokens - 1 if guesses else 0, lost=lost)

    def _guess(self, sequence: Sequence) -> tuple[list[int], list[float]]:
        """Guesses of what follows in a sequence, and their chances: of the past where it is at least as sure as the head."""
        guess, chances = self._look_up(sequence) if self.lookups else ([], [])
        chances = [1.0] * len(guess) if self.always else chances
        sequence.drafts_of_head = False
        if self.head is None or not sequence.proposed:
            return guess, chances
        proposed = [*sequence.proposed[: max(0, sequence.max_new_tokens - sequence.generated_tokens - 1)]]
        theirs = self.head.chances(sequence.head, len(proposed))
        if guess and chances[0] >= theirs[0]:
            return guess, chances
        sequence.drafts_of_head = True
        return proposed, [1.0] * len(proposed) if self.head.fixed is not None else theirs

    def _look_up(self, sequence: Sequence) -> tuple[list[int], list[float]]:
        lookup = sequence.lookup
        if lookup is None:
            lookup = sequence.lookup = PromptLookup(sequence.tokens, sequence.prompt_tokens)
        lookup.catch_up()
        # The last token of all is never fed, and under a mask only what the grammar allows may follow.
        limit = min(self.limit, sequence.max_new_tokens - sequence.generated_tokens - 1)
        if limit <= 0 or sequence.mask is not None:
            return [], []
        guess = lookup.guess(limit)
        if sequence.request.pictures:
            # What follows was said about a picture; its media tokens mean nothing without the vectors.
            pad = sequence.tokens[sequence.request.pictures[0].start]
            guess = guess[: guess.index(pad)] if pad in guess else guess
        return guess, lookup.chances(len(guess))


def step_bytes_of(model: ModelBytes) -> StepBytes:
    """What steps of a model read."""
    return StepBytes(
        shared_bytes=sum(model.layer_bytes) - sum(model.expert_bytes) + model.head_bytes,
        expert_bytes=sum(model.expert_bytes),
        experts=mean_routed_experts(model.config),
        experts_per_token=model.config.num_experts_per_tok,
        kv_token_bytes=model.kv_token_bytes,
        attention_bytes=sum(attention_flops(model.config, layer, 1) for layer in range(model.layers)) * BYTES_PER_FLOP,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBytes:
    """Bytes that a step reads from memory, as a function of how many tokens it has.

    Args:
        shared_bytes: by every step: all weights but routed experts and the embedding.
        expert_bytes: of all routed experts together.
        experts: of a layer, on the average.
        experts_per_token: of them that a token goes through.
        kv_token_bytes: cache of one token, all layers.
        attention_bytes: what is read in the time in which one token is attended to by one other, all layers.
        overhead_bytes: what is read in the time of a step's launches; 0 leaves them out.
    """

    shared_bytes: int
    expert_bytes: int
    experts: float
    experts_per_token: int
    kv_token_bytes: int
    attention_bytes: float = 0.0
    overhead_bytes: float = 0.0

    def cost(self, tokens: float, *, sequences: int, cached_tokens: int, disk_cost: float = 0.0) -> float:
        """What a step of `tokens` tokens costs, as bytes: those that it reads, and attention of each token over its sequence's
        context, which is arithmetic. At long contexts a guess costs more of that than of experts; where those come from a disk,
        `disk_cost` times their bytes on top."""
        attention = self.attention_bytes * cached_tokens * tokens / max(sequences, 1)
        read = self.read(tokens, cached_tokens=cached_tokens)
        return self.overhead_bytes + read + attention + disk_cost * self._experts(tokens)

    def read(self, tokens: float, *, cached_tokens: int = 0) -> float:
        """Bytes that a step of `tokens` tokens reads, whose sequences hold `cached_tokens` in all.

        E (1 - (1 - K/E)^m) distinct experts are expected when m tokens choose independently; a cache is read once for all
        the tokens of its sequence.
        """
        return self.shared_bytes + self._experts(tokens) + self.kv_token_bytes * cached_tokens

    def _experts(self, tokens: float) -> float:
        share: float = 1.0 - (1.0 - self.experts_per_token / self.experts) ** tokens
        return self.expert_bytes * share


def disk_cost_of(stages: Iterable[StageHealth]) -> float:
    """What a byte of a routed expert costs on top of reading it from memory, as bytes from memory, where stages read experts from
    their disks: the share that had to be read so far, by how much slower the disk was. 0 while nothing was read."""
    cost = layers = 0.0
    for stage in stages:
        count = stage.end_layer - stage.start_layer
        layers += count
        experts = stage.experts
        if experts is not None and experts.read_bytes and experts.read_bytes_per_s:
            missed = experts.misses / (experts.hits + experts.misses)
            cost += count * missed * MEMORY_BYTES_PER_S / experts.read_bytes_per_s
    return cost / layers if layers else 0.0


def choose_drafts(
    chances: Ordered[Ordered[float]], read: Callable[[int], float], *, others: int = 0, room: int | None = None
) -> list[int]:
    """How many guesses each sequence of a group gets, for the most expected tokens per byte.

    All orders of adding guesses cost the same bytes, so for any number of them the likeliest are best; every number is tried.

    Args:
        chances: for each sequence, for each of its guesses the chance that it and all before it are right (none rises).
        read: bytes of a step of so many tokens.
        others: tokens of the step that are of other sequences.
        room: most guesses in all.

    Returns:
        One number a sequence, 0 where guesses do not pay.
    """
    counts = [0] * len(chances)
    ranked = sorted(
        ((-chance, place, row) for row, line in enumerate(chances) for place, chance in enumerate(line)),
    )
    ranked = ranked if room is None else ranked[: max(0, room)]
    tokens = len(chances) + others
    expected = float(len(chances))
    best, best_rate = 0, expected / read(tokens)
    for added, (minus_chance, _, _) in enumerate(ranked, start=1):
        expected -= minus_chance
        rate = expected / read(tokens + added)
        if rate > best_rate:
            best, best_rate = added, rate
    for _, _, row in ranked[:best]:
        counts[row] += 1
    return counts


class PromptLookup:
    """What may follow in one sequence: the tokens that came after its last few when they stood there before.

    A constant amount of work for each token. Every generated token also judges what would have been guessed, whether it was sent
    or not, so the chances are known before the first guess costs anything.

    Args:
        tokens: of the sequence; the list that grows.
        prompt_tokens: so many of them were given and judge nothing.
    """

    __slots__ = ("_hits", "_index", "_key", "_prompt_tokens", "_read", "_run", "_source", "_tokens", "_tries")

    def __init__(self, tokens: Ordered[int], prompt_tokens: int) -> None:
        self._tokens = tokens
        self._prompt_tokens = prompt_tokens
        self._index: dict[int, int] = {}  # the last tokens, packed: where what followed them stands
        self._key = 0
        self._read = 0
        self._source: int | None = None  # where the next token is guessed from
        self._run = 0  # tokens that were guessed right in a row
        self._hits = [0.0] * _CLASSES
        self._tries = [0.0] * _CLASSES

    @property
    def run(self) -> int:
        """Tokens that were guessed right in a row."""
        return self._run

    def catch_up(self) -> None:
        """Take in the tokens that came since the last call."""
        for position in range(self._read, len(self._tokens)):
            self._push(position)
        self._read = len(self._tokens)

    def guess(self, limit: int) -> list[int]:
        """At most `limit` tokens that may follow; empty when nothing like the end stood there before."""
        if self._source is None:
            return []
        known, found = len(self._tokens), list[int]()
        for position in range(self._source, self._source + limit):
            found.append(self._tokens[position] if position < known else found[position - known])
        return found

    def chances(self, count: int) -> list[float]:
        """For each of `count` guessed tokens the chance that it and all before it are right; they never rise."""
        found, chance = [], 1.0
        for ahead in range(count):
            kind = _kind(self._run + ahead)
            chance *= (self._hits[kind] + PRIOR) / (self._tries[kind] + 1.0)
            found.append(chance)
        return found

    def _push(self, position: int) -> None:
        token = self._tokens[position]
        source, self._source = self._source, None
        right = source is not None and self._tokens[source] == token
        if source is not None and position >= self._prompt_tokens:
            kind = _kind(self._run)
            self._hits[kind] = self._hits[kind] * KEEP + right
            self._tries[kind] = self._tries[kind] * KEEP + 1.0
        self._key = (self._key << _BITS | token) & _MASK
        earlier: int | None = None
        if position + 1 >= NGRAM:
            earlier = self._index.get(self._key)
            self._index[self._key] = position + 1
        if source is not None and right:
            self._source, self._run = source + 1, self._run + 1
        else:
            self._source, self._run = earlier, 0


def _kind(run: int) -> int:
    return min((run + 1).bit_length() - 1, _CLASSES - 1)
