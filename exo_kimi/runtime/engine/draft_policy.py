"""How many tokens a draft head guesses for a sequence: as many as pay, by what was accepted so far and what a step costs.

Acceptance is measured by position in the chain, of each sequence, and begins with what was measured of all of them; guesses that
the head would have made and was not asked for count too (`steps.Proposal.judged`), so a sequence for which it guesses nothing is
measured all the same. Costs are those of `StepBytes`: distinct experts, launches, what is missed on disk, and the head's own
bytes for each link of a chain; and where steps of one sequence were timed, what they took (`StepTimes`).
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field
from typing import Literal

from exo_kimi.checkpoint.drafts.manifest import DraftManifest
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
KEEP_TIMES = 0.8
"""Weight of a step's time after each newer one with as many guesses."""
PLAIN_STEPS = 2.0
"""Steps, weighed so, from which on their time counts."""
PLAIN_EVERY = 256
"""Steps after which one is taken without guesses."""
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
    """Totals since the start, by position in the chain; `undrafted` are sequences that the head could not follow to their end."""

    tries: list[int] = field(default_factory=lambda: [0] * MOST_HEAD_DRAFTS)
    hits: list[int] = field(default_factory=lambda: [0] * MOST_HEAD_DRAFTS)
    proposed: int = 0
    judged: int = 0
    right: int = 0
    undrafted: int = 0


@dataclass(slots=True)
class StepTimes:
    """Seconds of the steps of a sequence that decoded alone, by the guesses in them, the last ones weighing most."""

    weights: list[float] = field(default_factory=lambda: [0.0] * (MOST_HEAD_DRAFTS + 1))
    seconds: list[float] = field(default_factory=lambda: [0.0] * (MOST_HEAD_DRAFTS + 1))
    steps: int = 0

    def note(self, guesses: int, taken_s: float) -> None:
        """A step with so many guesses was answered."""
        self.steps += 1
        if guesses <= MOST_HEAD_DRAFTS:
            self.weights[guesses] = self.weights[guesses] * KEEP_TIMES + 1.0
            self.seconds[guesses] += (taken_s - self.seconds[guesses]) / self.weights[guesses]

    @property
    def want_plain(self) -> bool:
        """Whether a step without guesses is to be taken, so that there is something to compare with."""
        return self.weights[0] < PLAIN_STEPS or self.steps % PLAIN_EVERY == 0

    def costs(self, counted: Ordered[float]) -> list[float]:
        """What steps with 0, 1 ... guesses take: as timed; between two that were timed in proportion; above them as counted, on
        the scale of the last one, but no less than the line through the last two says."""
        known = [count for count in range(len(counted)) if self.weights[count] >= (1.0 if count else PLAIN_STEPS)]
        if not known or known[0]:
            return [*counted]
        found = []
        for count, cost in enumerate(counted):
            low = max(each for each in known if each <= count)
            high = next((each for each in known if each >= count), None)
            if high is None:
                before = max((each for each in known if each < low), default=low)
                slope = (self.seconds[low] - self.seconds[before]) / max(1, low - before)
                scaled = cost * self.seconds[low] / counted[low]
                found.append(max(scaled, self.seconds[low] + slope * (count - low)))
            else:
                share = (count - low) / max(1, high - low)
                found.append(self.seconds[low] + share * (self.seconds[high] - self.seconds[low]))
        return found


@dataclass(slots=True)
class HeadState:
    """What is known of one sequence and the head.

    Args:
        acceptance: of its guesses.
        wanted: guesses that are asked for with each step, now.
        lost: the head does not hold all of it, and is not asked any more.
    """

    acceptance: Acceptance = field(default_factory=lambda: Acceptance(KEEP_OWN))
    wanted: int = 0
    lost: bool = False


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
        if state.lost:
            state.wanted = 0
        elif self.fixed is not None:
            state.wanted = self.fixed
        else:
            chances = self.chances(state, min(MOST_HEAD_DRAFTS, len(costs) - 1))
            rates = [(others + 1.0) / costs[0]]
            expected = others + 1.0
            for count, chance in enumerate(chances, start=1):
                expected += chance
                rates.append(expected / costs[count])
            best = max(range(len(rates)), key=rates.__getitem__)
            now = min(state.wanted, len(rates) - 1)
            needed = START_GAIN if now == 0 else CHANGE_GAIN
            if rates[now] < rates[0]:
                state.wanted = best  # it loses
            elif rates[best] >= needed * rates[now]:
                state.wanted = best
            else:
                state.wanted = now
        return max(0, min(state.wanted, most))

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
