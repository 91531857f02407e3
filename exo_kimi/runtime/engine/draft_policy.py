"""How many tokens a draft head guesses for a sequence: as many as pay, by what was accepted so far and what a step takes.

Acceptance is measured by position in the chain, of each sequence, and begins with what was measured of all of them; guesses that
the head would have made and was not asked for count too (`steps.Proposal.judged`), so a sequence for which it guesses nothing is
measured all the same. What a step takes is timed (`step_times`), and counted where it was not yet.

What guessing may lose is bounded whatever is believed: each sequence, and all together, have an `Account` of plain steps that it
may lose, a small share of what is decoded and a part of what it won before. Where times say that it loses while acceptance is
good, few guesses are sent now and then, ever more rarely, for times may be of a busy moment.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field
from typing import Literal

from exo_kimi.checkpoint.drafts.manifest import DraftManifest
from exo_kimi.runtime.engine.step_times import StepTimes
from exo_kimi.runtime.steps import Proposal

DraftTokens = Literal["auto"] | int
MOST_HEAD_DRAFTS = 6
FIRST_ACCEPTANCE = 0.64
"""Chance of each guess while nothing is known, given that the one before it was right. Source: K2.6's MLA head on real traffic,
0.633, 0.638 and 0.653 for three positions."""
PRIOR_WEIGHT = 3.0
"""Guesses that the prior of a sequence counts as."""
FIRST_WEIGHT = 8.0
"""Guesses that FIRST_ACCEPTANCE counts as among those of all sequences."""
KEEP_OWN, KEEP_ALL = 0.96, 0.995
"""Weight of an observation after each newer one, of a sequence and of all."""
PLAIN_EVERY, PLAIN_STEPS = 256, 3
"""Steps after which some are taken without guesses, so that there is something to compare with, and how many: a stage may compute
a plain step ahead, but not the first one after guesses."""
TRIED = 3.0
"""Guesses that were verified at a place of the chain, of whatever sequence, before the place behind it is used."""
LOSS_SHARE = 0.015
"""Of plain decoding's time, that guessing may lose."""
FIRST_LOSS, FIRST_LOSS_OF_ALL = 1.0, 2.0
"""Plain steps on top, of a sequence, and of all since the start."""
MOST_WON, MOST_WON_OF_ALL = 8.0, 64.0
"""Plain steps that were won and may be lost again."""
PROBE_STEPS, PROBE_FIRST, PROBE_LAST = 3, 384, 1 << 14
"""Guesses in a row that see whether it pays by now, and steps without guesses before the first time and between the last ones:
fewer than 1 % of the steps."""
MORE_EVERY, MORE_STEPS, MORE_FROM = 64, 2, 4.0
"""Steps with guesses of which some have one more than seems best, how many, and the plain steps that a sequence must have won."""
PROBE_CHANCE = 0.25
"""Chance of a first guess below which there is nothing to see. Source: `docs/drafts.md`, no machine gains below it."""
CHANGE_GAIN = 1.03
"""How much better another number must be than the one of now."""
START_GAIN = 1.06
"""How much better than none the first number must be."""


def guess_bytes(head: DraftManifest, target_head_bytes: int) -> int:
    """What a head reads for one guess: all of it but the embedding, and the target's output head where it has none.

    Args:
        head: its files.
        target_head_bytes: of the target's final norm and output head.
    """
    read = sum(source.resident_bytes for source in head.sources if source.spec.kind != "embedding")
    return read + (0 if head.parts.heads else target_head_bytes)


@dataclass(slots=True)
class Acceptance:
    """Guesses and how many of them were right, by position in the chain, the last ones weighing most.

    Args:
        keep: see KEEP_OWN.
    """

    keep: float
    tries: list[float] = field(default_factory=lambda: [0.0] * MOST_HEAD_DRAFTS)
    hits: list[float] = field(default_factory=lambda: [0.0] * MOST_HEAD_DRAFTS)

    def note(self, place: int, *, right: float, count: float = 1.0) -> None:
        """`count` guesses at a position were verified, `right` of them right, those before them having been."""
        forget = self.keep**count
        self.tries[place] = self.tries[place] * forget + count
        self.hits[place] = self.hits[place] * forget + right

    def chance(self, place: int, prior: float, weight: float) -> float:
        """Of a guess at a position, given that those before it are right."""
        return (self.hits[place] + prior * weight) / (self.tries[place] + weight)


@dataclass(slots=True, kw_only=True)
class HeadCounts:
    """Totals since the start, by position in the chain; `undrafted` are sequences that the head could not follow to their end.

    What was predicted: `expected_tokens` in the time of `expected_steps` plain ones."""

    tries: list[int] = field(default_factory=lambda: [0] * MOST_HEAD_DRAFTS)
    hits: list[int] = field(default_factory=lambda: [0] * MOST_HEAD_DRAFTS)
    proposed: int = 0
    judged: int = 0
    right: int = 0
    undrafted: int = 0
    expected_tokens: float = 0.0
    expected_steps: float = 0.0


@dataclass(slots=True)
class Account:
    """Plain steps that guessing may lose from now on.

    Args:
        credit: of them; guesses that cost more are not sent.
        most: see MOST_WON.
    """

    credit: float = FIRST_LOSS
    most: float = MOST_WON

    def note(self, *, won: float, lost: float) -> None:
        """A step gave a sequence `won` tokens more than one, and took `lost` plain steps more than one."""
        self.credit = min(self.most, self.credit + LOSS_SHARE * (1.0 + won) + won - lost)


@dataclass(slots=True)
class HeadState:
    """What is known of one sequence and the head.

    Args:
        acceptance: of its guesses.
        wanted: guesses that are asked for with each step, now.
        lost: the head does not hold all of it, and is not asked any more.
        account: what its guesses may lose.
    """

    acceptance: Acceptance = field(default_factory=lambda: Acceptance(KEEP_OWN))
    wanted: int = 0
    lost: bool = False
    account: Account = field(default_factory=Account)


@dataclass(slots=True)
class Probes:
    """When a guess is sent although it seems to lose.

    Args:
        idle: steps since one was sent.
        gap: steps to wait for.
        left: of the ones that go on now.
    """

    idle: int = 0
    gap: int = PROBE_FIRST
    left: int = 0

    def pays(self) -> None:
        """Guesses are sent because they pay."""
        self.idle = self.left = 0
        self.gap = PROBE_FIRST

    def due(self) -> bool:
        """Whether to send one with this step, which would have none."""
        self.idle += 1
        if not self.left and self.idle >= self.gap:
            self.left, self.gap = PROBE_STEPS, min(2 * self.gap, PROBE_LAST)
        if self.left:
            self.left -= 1
            self.idle = 0
            return True
        return False


@dataclass(slots=True, kw_only=True)
class HeadPolicy:
    """Chooses numbers of guesses.

    Args:
        draft_bytes: what the head reads for one guess of one sequence.
        fixed: guesses whatever they cost; None chooses.
    """

    draft_bytes: float
    fixed: int | None = None
    counts: HeadCounts = field(default_factory=HeadCounts)
    everywhere: Acceptance = field(default_factory=lambda: Acceptance(KEEP_ALL))
    times: StepTimes = field(default_factory=StepTimes)
    account: Account = field(default_factory=lambda: Account(FIRST_LOSS_OF_ALL, MOST_WON_OF_ALL))
    probes: Probes = field(default_factory=Probes)
    steps: int = 0

    @classmethod
    def of(cls, tokens: DraftTokens, *, draft_bytes: float) -> HeadPolicy:
        """What an option asks for: `auto`, or a number whatever it costs."""
        return cls(draft_bytes=draft_bytes, fixed=None if tokens == "auto" else tokens)

    def chances(self, state: HeadState, count: int) -> list[float]:
        """For each of `count` guesses of a sequence the chance that it and all before it are right; they never rise.

        A place that was never tried is taken to be as the one before it, which is near to the truth: see FIRST_ACCEPTANCE.
        """
        found, chance = [], 1.0
        own = FIRST_ACCEPTANCE
        for place in range(count):
            prior = self.everywhere.chance(place, own, FIRST_WEIGHT)
            own = state.acceptance.chance(place, prior, PRIOR_WEIGHT)
            chance *= own
            found.append(chance)
        return found

    def choose(self, state: HeadState, *, most: int, costs: Ordered[float], others: float) -> int:
        """How many guesses to ask for, for a sequence; kept in `state.wanted`.

        Args:
            state: of the sequence.
            most: guesses that it has a use for.
            costs: of a step in which it has 0, 1 ... guesses to verify and is asked for as many, all else as it is.
            others: tokens that the other sequences of the step are expected to get.
        """
        self.steps += 1
        if state.lost:
            state.wanted = 0
        elif self.fixed is not None:
            state.wanted = self.fixed
        else:
            state.wanted = self._best(state, costs, others)
        count = state.wanted
        if self.fixed is None and not state.lost:
            if count:
                self.probes.pays()
                rich = state.account.credit >= MORE_FROM and count < len(costs) - 1
                count += rich and self.steps % MORE_EVERY < MORE_STEPS
            elif self.chances(state, 1)[0] >= PROBE_CHANCE and self.probes.due():
                count = 1
            credit = min(state.account.credit, self.account.credit)
            while count and lost_steps(costs, count, others) > credit:
                count -= 1
        count = max(0, min(count, most))
        self.counts.expected_tokens += 1.0 + sum(self.chances(state, count))
        self.counts.expected_steps += costs[count] / costs[0]
        return count

    @property
    def wants_plain(self) -> bool:
        """Whether the next step of a sequence alone is to have no guesses, so that there is something to compare with."""
        return self.fixed is None and (not self.times.known(0) or self.steps % PLAIN_EVERY < PLAIN_STEPS)

    def _best(self, state: HeadState, costs: Ordered[float], others: float) -> int:
        """The number of guesses with the most tokens for what a step takes; that of now unless another is clearly better."""
        tried = next((n for n, tries in enumerate(self.everywhere.tries) if tries < TRIED), MOST_HEAD_DRAFTS)
        chances = self.chances(state, min(MOST_HEAD_DRAFTS, len(costs) - 1, tried + 1))
        rates = [(others + 1.0) / costs[0]]
        expected = others + 1.0
        for count, chance in enumerate(chances, start=1):
            expected += chance
            rates.append(expected / costs[count])
        best = max(range(len(rates)), key=rates.__getitem__)
        now = min(state.wanted, len(rates) - 1)
        needed = START_GAIN if now == 0 else CHANGE_GAIN
        loses = rates[now] < rates[0]
        return best if loses or rates[best] >= needed * rates[now] else now

    def on_step(self, state: HeadState, *, won: int, lost: float) -> None:
        """A step decoded a sequence: `won` guesses of the head were right, and it took `lost` plain steps more for them."""
        for account in (state.account, self.account):
            account.note(won=won, lost=lost)

    def on_verified(self, state: HeadState, *, drafts: int, accepted: int) -> None:
        """Guesses of the head were sent, and the first `accepted` were right."""
        for place in range(min(drafts, accepted + 1, MOST_HEAD_DRAFTS)):
            right = place < accepted
            self.counts.tries[place] += 1
            self.counts.hits[place] += right
            state.acceptance.note(place, right=float(right))
            self.everywhere.note(place, right=float(right))

    def on_proposal(self, state: HeadState, proposal: Proposal) -> None:
        """The head said something of a sequence."""
        self.counts.proposed += len(proposal.token_ids)
        if proposal.lost and not state.lost:
            state.lost = True
            self.counts.undrafted += 1
        if proposal.judged:
            self.counts.judged += proposal.judged
            self.counts.right += proposal.right
            for acceptance in (state.acceptance, self.everywhere):
                acceptance.note(0, right=float(proposal.right), count=float(proposal.judged))


def lost_steps(costs: Ordered[float], count: int, others: float) -> float:
    """Plain steps that a sequence's guesses cost at most, its own and those of the others that wait for them.

    Args:
        costs: of a step with 0, 1 ... guesses of the sequence.
        count: of them.
        others: tokens that the other sequences of the step get.
    """
    return (costs[count] / costs[0] - 1.0) * (1.0 + others)
