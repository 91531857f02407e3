"""A request while it waits, is fed to the stages and generates, and its share of the steps in flight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Literal

from exo_kimi.errors import RuntimeFault
from exo_kimi.pictures.picture import Picture
from exo_kimi.runtime.engine.draft_policy import HeadState
from exo_kimi.runtime.engine.prefix_index import CachedPrefix, Tokens, as_tokens
from exo_kimi.runtime.engine.speculation import PromptLookup
from exo_kimi.runtime.prefix_key import mark_adapter, mark_pictures
from exo_kimi.runtime.requests import FinishReason, GenerationRequest, RequestProgress
from exo_kimi.runtime.steps import PictureSpan, Sampled, Segment, SequenceStart


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixSource:
    """Caches on the stages whose first `tokens` tokens a sequence begins with; with `move` it takes them over. At the positions
    `snapshots` it holds their snapshots too."""

    seq_id: int
    tokens: int
    move: bool = False
    snapshots: tuple[int, ...] = ()


@dataclass(slots=True, kw_only=True)
class DiskRestore:
    """Reading the blocks that a sequence begins with from disk: their keys, how many were ordered, and for each unanswered order
    the position, in tokens, where it is to end. `snapshot` is the key of the states after the last block, where there are any."""

    keys: tuple[str, ...]
    snapshot: str | None = None
    ordered: int = 0
    due: list[int] = field(default_factory=list)
    failed: bool = False


@dataclass(slots=True, kw_only=True)
class Interruption:
    """What stages that failed did to a sequence since its last token; see `survival`.

    Args:
        fault: why they are away, or were.
        away_s: for how long, until they were last ready.
        suspicions: times that it was part of the step with which they ended.
    """

    fault: RuntimeFault
    away_s: float = 0.0
    suspicions: int = 0


ALONE_FROM_SUSPICIONS = 2
REQUEST_ID_CHARACTERS = 128
State = Literal["waiting", "running", "ended"]


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """A request and how far it is, as the scheduler sees it.

    Args:
        request: with a seed.
        order: arrival; the greatest is the youngest.
        max_new_tokens: where it ends with `length`.
        mask: what the next token may be, kept up to date by whoever drives the constraint.
        submitted_s: when it came, on the clock of whoever drives the scheduler.
    """

    request: GenerationRequest
    order: int
    max_new_tokens: int
    mask: bytes | None = None
    submitted_s: float = 0.0
    tokens: list[int] = field(init=False)
    state: State = field(default="waiting", init=False)
    seq_id: int = field(default=-1, init=False)
    """Its name on the stages; a new one each time that it is admitted."""
    num_computed_tokens: int = field(default=0, init=False)
    """Tokens in the caches once every step sent so far is done: the offset of its next segment. As in vLLM's scheduler."""
    num_confirmed_tokens: int = field(default=0, init=False)
    """Tokens in the last stage's cache, as far as results tell; at most `num_computed_tokens`."""
    num_counted_prompt_tokens: int = field(default=0, init=False)
    """The most prompt tokens that were ever done; unlike `num_confirmed_tokens` it survives a preemption."""
    registered: bool = field(default=False, init=False)
    epoch: int | None = field(default=None, init=False)
    """The last epoch in which it touched the stages."""
    awaiting_token: bool = field(default=False, init=False)
    """A step in flight will answer with its next token."""
    decoding: bool = field(default=False, init=False)
    """All that was known when it was admitted has been sent; from now on it is fed one token at a time, and drafts."""
    drafts: tuple[int, ...] = field(default=(), init=False)
    """Guesses of what follows its newest token, to be sent after it."""
    draft_masks: tuple[bytes | None, ...] = field(default=(), init=False)
    """What may follow each draft; empty where nothing is barred."""
    drafts_of_head: bool = field(default=False, init=False)
    """Whether its drafts are a draft head's."""
    propose: int = field(default=0, init=False)
    """Guesses that the head is asked for with the next token."""
    proposed: tuple[int, ...] = field(default=(), init=False)
    """What the head guessed to follow the newest token."""
    proposed_masks: tuple[bytes | None, ...] = field(default=(), init=False)
    """What may follow each of these; empty where nothing is barred."""
    head: HeadState = field(default_factory=HeadState, init=False)
    accepted_drafts: int = field(default=0, init=False)
    rejected_drafts: int = field(default=0, init=False)
    lookup: PromptLookup | None = field(default=None, init=False)
    """Where its drafts come from, made with the first ones."""
    takes_over: tuple[CachedPrefix, int] | None = field(default=None, init=False)
    """Caches that it takes over when it is admitted, and how many of their tokens."""
    source: PrefixSource | None = field(default=None, init=False)
    restoring: DiskRestore | None = field(default=None, init=False)
    damaged: bool = field(default=False, init=False)
    """Some stage's caches of it are shorter than others': nobody may begin from them."""
    snapshot_plan: set[int] | None = field(default=None, init=False)
    """Positions at which its states are to be kept; None until it is known where it begins."""
    parts_at: set[int] = field(default_factory=set, init=False)
    """Positions up to which another prompt was seen to be the same."""
    cached_tokens: int | None = field(default=None, init=False)
    """Prompt tokens that it began with when it was first sent; None before."""
    interruption: Interruption | None = field(default=None, init=False)
    queue_s: float | None = field(default=None, init=False)
    """How long it waited for its first step; None before that."""
    prompt_ids: Tokens = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_ids)
        self.prompt_ids = self.prefix_ids(None)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the true prompt."""
        return len(self.request.prompt_ids)

    @property
    def generated_tokens(self) -> int:
        """Tokens generated so far, preemptions included."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def runs_alone(self) -> bool:
        """Whether it may be what brings the stages down, so that nothing else is begun before it has a token."""
        return self.interruption is not None and self.interruption.suspicions >= ALONE_FROM_SUSPICIONS

    @property
    def num_new_tokens(self) -> int:
        """Known tokens that were not sent yet."""
        return len(self.tokens) - self.num_computed_tokens

    @property
    def final_cache_tokens(self) -> int:
        """Cached tokens at its very end; the last generated token is never fed."""
        return self.prompt_tokens + self.max_new_tokens - 1

    def prefix_ids(self, end: int | None) -> Tokens:
        """Its first tokens as prefixes are compared: equal only where pictures and adapter are too. `end` as in a slice."""
        ids, adapter = mark_pictures(as_tokens(self.tokens[:end]), self.request.pictures), self.request.adapter
        return ids if adapter is None else mark_adapter(ids, adapter.fingerprint)

    def next_tokens(self, length: int) -> list[int]:
        """The next tokens to send, with the drafts after the newest one."""
        found = self.tokens[self.num_computed_tokens : self.num_computed_tokens + length]
        return [*found, *self.drafts] if self.num_computed_tokens + length == len(self.tokens) else found

    def begin_from(self, source: PrefixSource | None) -> None:
        """Begin with what is cached, or with nothing."""
        self.source = source
        self.num_computed_tokens = source.tokens if source is not None else 0

    def begin(self, epoch: int) -> SequenceStart:
        """How it is registered on the stages, as of now."""
        self.registered = True
        self.epoch = epoch
        return SequenceStart(
            seq_id=self.seq_id,
            prompt_tokens=self.prompt_tokens,
            sampling=self.request.sampling,
            history=tuple(self.tokens[self.prompt_tokens :]),
            source=self.source.seq_id if self.source is not None else None,
            restore=self.num_computed_tokens,
            move=self.source is not None and self.source.move,
            snapshots=self.source.snapshots if self.source is not None else (),
            seen=self._seen(),
            request_id=self.request.request_id[:REQUEST_ID_CHARACTERS],
            adapter=None if self.request.adapter is None else self.request.adapter.name,
        )

    def _seen(self) -> tuple[int, ...]:
        """Ids that the last stage will not be fed, if it has to know them."""
        skips = self.source is not None or self.restoring is not None
        return tuple(sorted(set(self.tokens))) if skips and self.request.sampling.repetition_penalty != 1 else ()

    def until_snapshot(self, length: int) -> int:
        """How many of its next tokens it is fed so that a pass ends where its states are to be kept."""
        end = self.num_computed_tokens + length
        stops = [position for position in self.snapshot_plan or () if self.num_computed_tokens < position < end]
        return min(stops, default=end) - self.num_computed_tokens

    def take(self, length: int, *, snapshot: bool = False) -> tuple[Segment, ScheduledChunk]:
        """Its next segment, which counts as sent; the one that reaches its newest token takes the drafts and samples. With
        `snapshot` the stages keep their states after it."""
        offset, end = self.num_computed_tokens, self.num_computed_tokens + length
        sample = end == len(self.tokens)
        self.num_computed_tokens = end
        self.awaiting_token = sample
        self.decoding = self.decoding or sample
        mask = self.mask if sample else None
        drafts, self.drafts = len(self.drafts) if sample else 0, ()
        draft_masks, self.draft_masks = self.draft_masks if drafts else (), ()
        self.proposed, self.proposed_masks = (), ()
        segment = Segment(
            seq_id=self.seq_id,
            offset=offset,
            length=length + drafts,
            sample=sample,
            mask=mask,
            drafts=drafts,
            pictures=tuple(self._spans(offset, end)),
            draft_masks=draft_masks,
            propose=self.propose if sample else 0,
            snapshot=snapshot,
        )
        chunk = ScheduledChunk(
            sequence=self,
            seq_id=self.seq_id,
            end=end,
            sample=sample,
            drafts=drafts,
            of_head=self.drafts_of_head,
            masked=bool(draft_masks),
        )
        return segment, chunk

    def _spans(self, offset: int, end: int) -> Iterator[PictureSpan]:
        """The parts of its pictures that lie in the positions from `offset` to `end`."""
        for shown in self.request.pictures:
            first, last = max(offset, shown.start), min(end, shown.start + shown.tokens)
            if first < last:
                yield PictureSpan(first - offset, last - first, shown.picture.digest, first - shown.start)

    def pictures_of(self, segment: Segment) -> Iterator[Picture]:
        """The pictures that a segment of it needs."""
        needed = {span.digest for span in segment.pictures}
        return (shown.picture for shown in self.request.pictures if shown.picture.digest in needed)

    def accept(self, run: Ordered[Sampled], *, masked: bool = False) -> Iterator[Sampled]:
        """Append the tokens of one answer, giving each to the caller, who may end the sequence or set its mask: what comes
        after is then dropped, for it was drawn without them (unless `masked`: each was drawn with its own)."""
        for place, sampled in enumerate(run, start=1):
            self.tokens.append(sampled.token_id)
            self.accepted_drafts += place < len(run)  # the last one is the model's own
            yield sampled
            if self.state == "ended" or (self.mask is not None and not masked):
                break
        if self.registered and self.decoding:  # the caches hold all of it but the newest
            self.num_computed_tokens = len(self.tokens) - 1

    def take_proposal(self, token_ids: Iterable[int]) -> None:
        """Guesses of what follows the newest token; none from a stop on, for what samples after the one before it gives that."""
        stops = self.request.stop_ids
        self.proposed = tuple(takewhile(lambda token_id: token_id not in stops, token_ids))
        self.proposed_masks = ()

    def reached(self, end: int) -> int:
        """The last stage's cache holds `end` tokens. Returns how many prompt tokens that are new to it ever."""
        self.num_confirmed_tokens = end
        fresh = max(0, min(end, self.prompt_tokens) - self.num_counted_prompt_tokens)
        self.num_counted_prompt_tokens += fresh
        return fresh

    def forget(self) -> None:
        """It holds nothing on the stages any more; a token on its way is still its next one."""
        self.num_computed_tokens = self.num_confirmed_tokens = 0
        self.drafts = self.draft_masks = self.proposed = self.proposed_masks = ()
        self.head.lost = False
        self.registered = self.decoding = self.damaged = False
        self.takes_over = self.source = self.restoring = self.snapshot_plan = None
        self.seq_id = -1

    def finish_reason(self) -> FinishReason | None:
        """Why it ends with its newest token, if it does."""
        if self.generated_tokens and self.tokens[-1] in self.request.stop_ids:
            return "stop"
        return "length" if self.generated_tokens >= self.max_new_tokens else None

    def progress(self) -> RequestProgress:
        """Where it stands."""
        running: Literal["prefill", "decode"] = "decode" if self.generated_tokens else "prefill"
        return RequestProgress(
            request_id=self.request.request_id,
            state=running if self.state == "running" else "waiting",
            prompt_tokens=self.prompt_tokens,
            prompt_done=min(self.num_confirmed_tokens, self.prompt_tokens),
            generated_tokens=self.generated_tokens,
            cached_tokens=self.cached_tokens or 0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledChunk:
    """The tokens of one sequence in a step in flight, a prefill chunk or one token to decode (and drafts). `end` is the position
    after them, drafts apart; `of_head` tells whose drafts these are, and `masked` that each has a mask of its own. `seq_id` tells
    whether the sequence was preempted since."""

    sequence: Sequence
    seq_id: int
    end: int
    sample: bool
    drafts: int = 0
    of_head: bool = False
    masked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInFlight:
    """A step that was sent and not answered yet: how many tokens it has, and how many its sequences hold in their caches."""

    step_id: int
    chunks: tuple[ScheduledChunk, ...]
    tokens: int
    cached_tokens: int
    restores: tuple[tuple[Sequence, int], ...] = ()
    """Who reads from disk, under which name."""

    @property
    def asked(self) -> list[ScheduledChunk]:
        """Those after which a token is asked for."""
        return [chunk for chunk in self.chunks if chunk.sample]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """One token that a step gave to a sequence that still wants it."""

    sequence: Sequence
    sampled: Sampled
