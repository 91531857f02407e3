"""A draft head on the last stage: it follows every sequence beside the model, and guesses what comes next.

Entry n of its cache is made of the feature of position n - 1 and the token at position n, so that a model's cache of n tokens
goes with the entries 1 to n. All entries are made of true features and true tokens: what a chain of guesses adds is taken back
before the answer leaves, and after verification the accepted positions are entered with what the model had for them.

Features wait as rows until their entries are needed: for a guess, for a copy of the caches, or because many wait. So a sequence
for which nothing is guessed costs the head one pass for `MOST_WAITING` tokens; that pass also tells how many of them it would
have guessed.

Source: "EAGLE-3", Li et al. 2025, sections 3.1 and 3.2; tokens are drawn with the model's random numbers, see
`sampling.guess_token`.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakSet

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from exo_kimi.runtime.reserve import MOST_WAITING, MOST_WAITING_ROWS
from exo_kimi.runtime.stage.caches import Leaves, append, capacity_for, copy_prefix, cut, room
from exo_kimi.runtime.stage.sampling import SequenceSampler, guess_token
from exo_kimi.runtime.steps import Proposal, Sampled, Segment, Step

PIECE_ROWS = 512
"""Rows of one pass of the head: what it takes beside its cache stays small."""
CHAIN_MOST = 6
"""Guesses of one sequence in a step at most."""
BLOCK_PREFIX = "draft."
NOTHING = -1


class DraftModel(Protocol):
    """What a stage needs of `models.draft_head.DraftHead`."""

    def make_cache(self) -> list[Any]: ...

    def fuse(self, features: mx.array) -> mx.array: ...

    def __call__(
        self, token_ids: mx.array, hidden: mx.array, segments: Sequence[tuple[int, Sequence[Any]]]
    ) -> mx.array: ...

    def logits(self, out: mx.array) -> mx.array: ...

    def next_hidden(self, out: mx.array) -> mx.array: ...

    def to_target_ids(self, draft_ids: mx.array) -> mx.array: ...


@dataclass(slots=True, eq=False, weakref_slot=True)
class DraftState:
    """One sequence, as the head follows it.

    Args:
        caches: of the head.
        prompt_tokens: of the sequence, whose prediction nobody asks for.
        rows: (n, features) that wait to be entered, of the positions after those entered; None for none.
        following: the tokens after these positions; the last may not be known yet.
        judged, right: see `steps.Proposal`.
    """

    caches: list[Any]
    prompt_tokens: int = 0
    rows: mx.array | None = None
    following: list[int] = field(default_factory=list)
    judged: int = 0
    right: int = 0

    @property
    def entered(self) -> int:
        """Entries of the cache."""
        return int(self.caches[0].offset)

    @property
    def waiting(self) -> int:
        """Rows that wait."""
        return 0 if self.rows is None else int(self.rows.shape[0])

    @property
    def length(self) -> int:
        """Tokens that the model's cache holds, as far as the head followed."""
        return self.entered + self.waiting

    @property
    def nbytes(self) -> int:
        """Bytes of the cache and of what waits."""
        return sum(int(cache.nbytes) for cache in self.caches) + (0 if self.rows is None else int(self.rows.nbytes))

    def take_verdict(self) -> tuple[int, int]:
        """What was judged and right since the last call."""
        told, self.judged, self.right = (self.judged, self.right), 0, 0
        return told

    def keep(self, length: int) -> None:
        """Forget what is beyond `length` tokens."""
        excess = self.length - length
        if excess <= 0:
            return
        kept = self.waiting - excess
        self.rows = self.rows[:kept] if self.rows is not None and kept > 0 else None
        self.following = self.following[: max(kept, 0)]
        for cache in self.caches if kept < 0 else ():
            cache.trim(-kept)


class DraftRunner:
    """The head of a stage, and what it does for the stage's sequences.

    Args:
        model: the head.
        vocab_size: of the model that it guesses for.
        most_waiting: rows of all sequences together that wait after a step.
    """

    def __init__(self, model: DraftModel, *, vocab_size: int, most_waiting: int = MOST_WAITING_ROWS) -> None:
        self.model = model
        self._vocab_size = vocab_size
        self._most_waiting = most_waiting
        self._states: WeakSet[DraftState] = WeakSet()
        self._target_ids: npt.NDArray[np.int64] | None = None

    def begin(self, *, prompt_tokens: int) -> DraftState:
        """A sequence without tokens."""
        state = DraftState(self.model.make_cache(), prompt_tokens)
        self._states.add(state)
        return state

    def copy(self, source: DraftState, *, length: int, total: int, prompt_tokens: int) -> DraftState | None:
        """A sequence that begins as the first `length` tokens of another, and is to hold `total`; None where that is not held."""
        self.enter([source])
        if source.entered < length:
            return None
        made = self.begin(prompt_tokens=prompt_tokens)
        copy_prefix(source.caches, made.caches, length=length, capacity=capacity_for(total, made.caches))
        return made

    def follow(
        self,
        step: Step,
        sequences: Sequence[tuple[DraftState | None, SequenceSampler | None]],
        features: mx.array,
        sampled: Iterable[Sampled],
    ) -> tuple[Proposal, ...]:
        """Take in what a step computed, and guess what it asks for.

        Args:
            step: that was carried out.
            sequences: of its segments, in order; a state holds what is before the segment.
            features: (tokens of the step, features).
            sampled: what the step answers.

        Returns:
            What there is to say of its sequences.
        """
        runs: dict[int, list[int]] = {}
        for one in sampled:
            runs.setdefault(one.seq_id, []).append(one.token_id)
        tokens, start = step.tokens.tolist(), 0
        taken: list[tuple[DraftState, list[int], list[int]]] = []
        asked: list[tuple[Segment, DraftState, SequenceSampler]] = []
        lost: list[Proposal] = []
        for segment, (state, sampler) in zip(step.segments, sequences, strict=True):
            first, start = start, start + segment.length
            if state is None:
                lost += [Proposal(seq_id=segment.seq_id, lost=True)] if segment.propose else []
                continue
            known = segment.length - segment.drafts
            run = runs.get(segment.seq_id, [])
            kept = known - 1 + len(run) if segment.sample else known
            if state.waiting > len(state.following):
                state.following.append(tokens[first])
            taken.append((state, [*range(first, first + kept)], [*tokens[first + 1 : first + known], *run]))
            if segment.sample and segment.propose and sampler is not None:
                asked.append((segment, state, sampler))
        self._take(taken, features)
        outs = self._enter_due([state for state, _, _ in taken], [state for _, state, _ in asked])
        self._make_room()
        found = {segment.seq_id: guesses for segment, guesses in self._chains(asked, outs)}
        proposals = []
        for segment, (state, _) in zip(step.segments, sequences, strict=True):
            guesses = found.get(segment.seq_id, [])
            if state is not None and segment.sample and (guesses or state.judged):
                judged, right = state.take_verdict()
                proposals.append(Proposal(seq_id=segment.seq_id, token_ids=tuple(guesses), judged=judged, right=right))
        return (*proposals, *lost)

    def enter(self, states: Sequence[DraftState], *, judged: Container[DraftState] = ()) -> dict[int, mx.array]:
        """Enter all rows whose tokens are known.

        Args:
            states: of sequences.
            judged: those of which the head guessed nothing meanwhile.

        Returns:
            For each state, by its place, what the head gives for its last row, (1, D); without those that had none.
        """
        places = [place for place, state in enumerate(states) if state.following]
        last: dict[int, mx.array] = {}
        while places:
            counts = [min(len(states[place].following), PIECE_ROWS) for place in places]
            rows = [_rows(states[place])[:count] for place, count in zip(places, counts, strict=True)]
            ids = [token for p, count in zip(places, counts, strict=True) for token in states[p].following[:count]]
            segments = [(count, states[place].caches) for place, count in zip(places, counts, strict=True)]
            hidden = self.model.fuse(mx.concatenate(rows) if len(rows) > 1 else rows[0])
            out = self.model(mx.array(ids, mx.int32), hidden, segments)
            self._judge([(states[p], count) for p, count in zip(places, counts, strict=True)], judged, out)
            ends = np.cumsum(counts)
            for place, count, end in zip(places, counts, ends.tolist(), strict=True):
                state = states[place]
                last[place] = out[end - 1 : end]
                rest = state.waiting - count
                state.rows = mx.take(_rows(state), mx.arange(count, count + rest), axis=0) if rest else None
                state.following = state.following[count:]
            # No lazy graph outlives a step, nor a piece.
            mx.eval(
                list(last.values()),
                [cache.state for place in places for cache in states[place].caches],
                [left for place in places if (left := states[place].rows) is not None],
            )
            places = [place for place in places if states[place].following]
        return last

    def blocks(self, state: DraftState | None, start: int, end: int) -> Leaves:
        """What goes to the disk beside the model's caches of the tokens [start, end): the entries of these tokens. There is no
        entry 0, in whose place are zeros."""
        if state is None:
            return {}
        self.enter([state])
        if state.entered < end - 1:
            return {}
        leaves = cut(state.caches, max(start - 1, 0), end - 1)
        if start == 0:
            leaves = {name: mx.pad(leaf, [(0, 0)] * 3 + [(1, 0), (0, 0)]) for name, leaf in leaves.items()}
            mx.eval(list(leaves.values()))
        return {BLOCK_PREFIX + name: leaf for name, leaf in leaves.items()}

    def restore(self, state: DraftState, blocks: Mapping[str, mx.array], *, start: int, total: int) -> None:
        """Take in what `blocks` gave for tokens from `start` on, as much of it as follows what is held."""
        if state.length != max(start - 1, 0) or not blocks:
            return
        leaves = {name: leaf[..., 1:, :] if start == 0 else leaf for name, leaf in blocks.items()}
        append(state.caches, leaves, capacity=capacity_for(total, state.caches))

    def _take(self, taken: Sequence[tuple[DraftState, list[int], list[int]]], features: mx.array) -> None:
        """Let rows of a step wait, copied, so that the step's other rows are let go."""
        made: list[mx.array] = []
        for state, rows, following in taken:
            if not rows:
                continue
            fresh = mx.take(features, mx.array(rows, mx.int32), axis=0)
            state.rows = fresh if state.rows is None else mx.concatenate([state.rows, fresh])
            state.following += following
            made.append(state.rows)
        mx.eval(made)

    def _make_room(self) -> None:
        """Enter rows, those of the sequence with the most first, until there is room for what waits. A row whose next token is
        not known cannot be entered: where even those are too many, the head loses the newest of these sequences."""
        states = sorted(self._states, key=lambda state: state.waiting, reverse=True)
        total = sum(state.waiting for state in states)
        for state in states:
            if total <= self._most_waiting:
                return
            before = state.waiting
            self.enter([state], judged=[state])
            total -= before - state.waiting
        for state in sorted(self._states, key=lambda state: state.entered):
            if total <= self._most_waiting:
                return
            total -= state.waiting
            state.keep(state.entered)

    def _enter_due(self, states: Sequence[DraftState], asked: Sequence[DraftState]) -> list[mx.array]:
        """Enter what cannot wait any longer; what the head gives for the last rows of those that are asked."""
        others = [state for state in states if state not in asked and len(state.following) >= MOST_WAITING]
        last = self.enter([*asked, *others], judged=others)
        return [last[place] for place in range(len(asked))]

    def _chains(
        self, asked: Sequence[tuple[Segment, DraftState, SequenceSampler]], outs: list[mx.array]
    ) -> list[tuple[Segment, list[int]]]:
        """Guess, each guess fed to the head for the next one; all of them are taken back from its caches."""
        if not asked:
            return []
        wanted = [min(segment.propose, CHAIN_MOST, 1 + room(state.caches)) for segment, state, _ in asked]
        entered = [state.entered for _, state, _ in asked]
        samplers = [sampler for _, _, sampler in asked]
        plain = all(sampler.is_plain for sampler in samplers)
        chosen: list[tuple[list[int], mx.array]] = []
        alive, out = list(range(len(asked))), mx.concatenate(outs)
        while True:
            tokens = self._largest(out) if plain else self._drawn(out, [samplers[i] for i in alive])
            chosen.append((alive, tokens))
            going = [row for row, i in enumerate(alive) if wanted[i] > len(chosen)]
            if not plain:
                going = [row for row in going if int(tokens[row]) != NOTHING]
            if not going:
                break
            if len(going) < len(alive):
                picked = mx.array(going, mx.int32)
                out, tokens = mx.take(out, picked, axis=0), mx.take(tokens, picked, axis=0)
                alive = [alive[row] for row in going]
            out = self.model(tokens, self.model.next_hidden(out), [(1, asked[i][1].caches) for i in alive])
        mx.eval([tokens for _, tokens in chosen], [cache.state for _, state, _ in asked for cache in state.caches])
        found: list[list[int]] = [[] for _ in asked]
        for who, tokens in chosen:
            for i, token in zip(who, _ids(tokens), strict=True):
                found[i] += [token] if token != NOTHING else []
        for (_, state, sampler), held, guesses in zip(asked, entered, found, strict=True):
            if not plain:
                sampler.forget(len(guesses))
            for cache in state.caches:
                cache.trim(int(cache.offset) - held)
        return [(segment, guesses) for (segment, _, _), guesses in zip(asked, found, strict=True)]

    def _largest(self, out: mx.array) -> mx.array:
        """The likeliest token after each row; nothing is evaluated."""
        return self.model.to_target_ids(mx.argmax(self.model.logits(out), axis=-1)).astype(mx.int32)

    def _drawn(self, out: mx.array, samplers: Sequence[SequenceSampler]) -> mx.array:
        """A token after each row as its sampler draws it; NOTHING where there is none."""
        logits = np.asarray(self.model.logits(out).astype(mx.float32))
        if self._target_ids is None:
            self._target_ids = np.asarray(self.model.to_target_ids(mx.arange(logits.shape[1]))).astype(np.int64)
        found = []
        for row, sampler in zip(logits, samplers, strict=True):
            wide = np.full(self._vocab_size, -np.inf, np.float32)
            wide[self._target_ids] = row
            token_id = guess_token(wide, sampler)
            found.append(NOTHING if token_id is None else token_id)
        return mx.array(found, mx.int32)

    def _judge(self, entered: Sequence[tuple[DraftState, int]], judged: Container[DraftState], out: mx.array) -> None:
        """Count how many tokens, of those that were generated and are known already, the head would have guessed."""
        rows, truth, who, start = list[int](), list[int](), list[DraftState](), 0
        for state, count in entered:
            first = max(0, state.prompt_tokens - 2 - (state.entered - count))
            looked = range(first, count - 1) if state in judged else range(0)
            rows += [start + row for row in looked]
            truth += [state.following[row + 1] for row in looked]
            who += [state] * len(looked)
            start += count
        if not rows:
            return
        guesses = _ids(self._largest(mx.take(out, mx.array(rows, mx.int32), axis=0)))
        for state, guess, token in zip(who, guesses, truth, strict=True):
            state.judged += 1
            state.right += guess == token


def _rows(state: DraftState) -> mx.array:
    if state.rows is None:
        raise ValueError("no rows wait")
    return state.rows


def _ids(tokens: mx.array) -> list[int]:
    found: list[int] = np.asarray(tokens).tolist()
    return found
