"""The work that walks through the stages: one step is one forward pass over a ragged group of sequences.

    leader --Step(tokens)--> stage 0 --Step(hidden)--> ... --> last stage --StepResult(token ids)--> leader

Frames keep their order along the chain, so a `free` that follows a step is carried out after that step everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from exo_kimi.errors import ExpertReadError
from exo_kimi.pictures.picture import Picture
from exo_kimi.runtime.requests import SamplingParams

NO_EPOCH = 0  # before a join, and after the leader was lost; a leader counts from 1

HiddenDtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hidden:
    """Hidden states between two stages: `data` holds tokens * hidden_size elements, row-major, little-endian.

    Where a draft head reads features of layers before the stage that is given them, each row is the token's hidden state and,
    behind it, those features, ascending: `hidden_size` is then a multiple of the model's."""

    dtype: HiddenDtype
    tokens: int
    hidden_size: int
    data: bytes | memoryview

    def rows(self, chosen: npt.NDArray[np.int64]) -> Hidden:
        """Those of some tokens, copied."""
        data = np.frombuffer(self.data, np.uint8).reshape(self.tokens, -1)[chosen]
        return replace(self, tokens=len(chosen), data=data.tobytes())


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceStart:
    """Registers a sequence on every stage. `history` are tokens generated before a preemption (for penalties and for the
    position in the random stream); they come again as the tail of the prompt. `prompt_tokens` counts the true prompt.

    With `restore`, its caches begin with the first `restore` tokens of those of `source`, which every stage holds: a copy,
    or with `move` the caches themselves, and `source` is gone. `seen` are the ids among them, where a penalty asks for them.
    A state cannot be cut: where layers have any, `restore` is where those of `source` are now, or where a snapshot of them was
    taken. `snapshots` are the positions of those that it holds on to, by reference.
    `request_id` is for the stages' logs. `adapter` is the name of the adapter that all its tokens go through.
    """

    seq_id: int
    prompt_tokens: int
    sampling: SamplingParams
    history: tuple[int, ...] = ()
    source: int | None = None
    restore: int = 0
    move: bool = False
    seen: tuple[int, ...] = ()
    snapshots: tuple[int, ...] = ()
    request_id: str = ""
    adapter: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """Consecutive blocks of `block_tokens` tokens of one sequence, the first at position `offset`, under their disk keys; and
    with the key `snapshot` the states after the last of them (after `offset` without any)."""

    seq_id: int
    offset: int
    block_tokens: int
    keys: tuple[str, ...]
    snapshot: str | None = None

    @property
    def end(self) -> int:
        """The position after the last block."""
        return self.offset + len(self.keys) * self.block_tokens

    @property
    def all_keys(self) -> tuple[str, ...]:
        """Of the blocks and the states."""
        return self.keys if self.snapshot is None else (*self.keys, self.snapshot)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldCaches:
    """Caches that a stage holds over an epoch, under the name of their sequence: of its first `tokens` tokens, and of any fewer
    down to `least_tokens`, which is 0 but for states of one size."""

    seq_id: int
    tokens: int
    least_tokens: int = 0


@dataclass(frozen=True, slots=True)
class PictureSpan:
    """Media tokens of a segment: from its token `start` on, `tokens` of them take the vectors of picture `digest` from its
    `first` on."""

    start: int
    tokens: int
    digest: str
    first: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """The next `length` tokens of one sequence. `offset` is the position of the first, equal to what the sequence's cache
    holds; a stage refuses any other. `sample` asks the last stage for a token after the segment's last position.

    The last `drafts` of the tokens are guesses. `sample` then asks for a token after the position before the first guess,
    and after each guess that was right (equal to the token before it in the answer). The next segment's offset tells how
    much of it stays: it may be smaller than what the cache holds, by at most `drafts`, and a stage drops what is beyond.

    `mask` is for the first token that is asked for; `draft_masks`, where there are any, for the one after each guess.
    `propose` asks the last stage's draft head for as many guesses of what follows the token that is sampled last.
    `snapshot` asks every stage to hold on to its states after the segment, which has no drafts then."""

    seq_id: int
    offset: int
    length: int
    sample: bool
    mask: bytes | None = None
    drafts: int = 0
    pictures: tuple[PictureSpan, ...] = ()
    draft_masks: tuple[bytes | None, ...] = ()
    propose: int = 0
    snapshot: bool = False

    @property
    def masks(self) -> tuple[bytes | None, ...]:
        """What may be chosen, for each token that is asked for."""
        return (self.mask, *(self.draft_masks or (None,) * self.drafts))


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedSequence:
    """A sequence that a stage cannot go on with, though it can with others: the stage's index, and the fields of the error."""

    seq_id: int
    stage: int
    what: str
    expected: str | None = None
    found: str | None = None
    where: str | None = None
    fix: str | None = None

    @classmethod
    def of(cls, seq_id: int, error: ExpertReadError) -> FailedSequence:
        """As an error says, on the stage that it names."""
        return cls(
            seq_id=seq_id,
            stage=error.stage or 0,
            what=error.what,
            expected=error.expected,
            found=error.found,
            where=error.where,
            fix=error.fix,
        )

    def error(self) -> ExpertReadError:
        """The error for whoever waits for the sequence."""
        return ExpertReadError(
            f"stage {self.stage}: {self.what}",
            stage=self.stage,
            expected=self.expected,
            found=self.found,
            where=self.where,
            fix=self.fix,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One pass. `tokens` int32 [sum of segment lengths] stays in the step on every stage; `hidden` is None for stage 0.
    A stage first drops the caches of `free`, then registers `begin`, then lets go of the snapshots `forget`, each of a sequence
    at a position, deletes the blocks `drop` from its disk, reads `restore` from there onto the ends of caches, runs `segments`
    (may be empty), and puts `store` on its way to the disk.

    A stage that cannot read a block leaves the rest of that order undone. `restored` gathers on the way, for each sequence
    of `restore`, how many tokens every stage so far holds; the sequence's first segment may start at any position up to
    that, and what a stage holds beyond is dropped. Where layers have states it starts at the end of what was asked for, or at 0:
    a stage without the states says less. An order from 0 on begins anew.

    `pictures` are those that the segments' spans name, each once; only the first stage gets them. They come again with every
    chunk that needs them, so a stage that was started anew has them too.

    `failed` gathers sequences on the way that a stage could not go on with; it has left their segments and blocks out. Until the
    leader frees them, it leaves out what else comes for them, and says so again."""

    epoch: int
    step_id: int
    segments: tuple[Segment, ...]
    tokens: npt.NDArray[np.int32]
    begin: tuple[SequenceStart, ...] = ()
    free: tuple[int, ...] = ()
    hidden: Hidden | None = None
    restore: tuple[Blocks, ...] = ()
    store: tuple[Blocks, ...] = ()
    drop: tuple[str, ...] = ()
    forget: tuple[tuple[int, int], ...] = ()
    restored: tuple[tuple[int, int], ...] = ()
    pictures: tuple[Picture, ...] = ()
    failed: tuple[FailedSequence, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A token chosen for one sequence; log-probabilities only when its SamplingParams ask for them."""

    seq_id: int
    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What the last stage's draft head says of one sequence.

    Args:
        seq_id: of a segment with `sample`.
        token_ids: guesses of what follows its newest token; may be fewer than were asked for.
        judged: tokens that it would have guessed first but was not asked for, looked at since it last told.
        right: of those, how many it would have guessed right.
        lost: it cannot follow this sequence any more, for it does not hold all of it.
    """

    seq_id: int
    token_ids: tuple[int, ...] = ()
    judged: int = 0
    right: int = 0
    lost: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What the last stage answers for a step: for each segment with `sample`, in order, one Sampled, and one more for each
    draft that was right; `restored` as in the step, (sequence, tokens that all stages hold); `failed` as in the step, of which
    nothing is sampled; `proposals` of the draft head, where it has something to say."""

    epoch: int
    step_id: int
    sampled: tuple[Sampled, ...]
    restored: tuple[tuple[int, int], ...] = ()
    failed: tuple[FailedSequence, ...] = ()
    proposals: tuple[Proposal, ...] = ()
