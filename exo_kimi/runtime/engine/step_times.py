"""How long steps take by the guesses in them: as timed, and where they were not, as counted on the scale of those that were.

A step of one sequence alone is looked up by its number of guesses. Steps of several sequences have too many shapes for that: a
line through counted cost and seconds stands for them. Of the last few times the median counts: other work of the machine makes
some of them longer, and the least of few would promise more than most steps keep.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

RECENT = 7
"""Times that are kept of each number of guesses."""
KNOWN = 2
"""Times from which on they count."""
MOST_TIMED = 6
"""Guesses of one sequence whose steps are timed apart."""
KEEP = 0.98
"""Weight of a step in the line after each newer one."""
LEAST_FIXED = 0.1
"""No step takes less than this part of what a line through nothing says."""
STEEPEST = 8.0
"""The line's slope is at most this many times that of a line through nothing."""


@dataclass(slots=True)
class CostLine:
    """seconds = a + b * counted cost, of steps that only decode, the last ones weighing most."""

    weight: float = 0.0
    costs: float = 0.0
    seconds: float = 0.0
    squares: float = 0.0
    products: float = 0.0

    def note(self, cost: float, taken_s: float) -> None:
        """A step of so much counted cost was answered."""
        for name, value in (
            ("weight", 1.0),
            ("costs", cost),
            ("seconds", taken_s),
            ("squares", cost * cost),
            ("products", cost * taken_s),
        ):
            setattr(self, name, getattr(self, name) * KEEP + value)

    def at(self, costs: Sequence[float]) -> list[float]:
        """What steps of these counted costs take, in seconds, or as counted while there is no line."""
        if not self.weight:
            return [*costs]
        mean, mean_s = self.costs / self.weight, self.seconds / self.weight
        variance = self.squares / self.weight - mean * mean
        if variance <= (0.02 * mean) ** 2:
            return [*costs]
        slope = (self.products / self.weight - mean * mean_s) / variance
        slope = min(max(slope, 0.0), STEEPEST * mean_s / mean)
        least = min(costs)
        lowest_s = max(mean_s + slope * (least - mean), LEAST_FIXED * mean_s * min(1.0, least / mean))
        return [lowest_s + slope * (cost - least) for cost in costs]


@dataclass(slots=True)
class StepTimes:
    """Times of steps that only decode.

    Args:
        recent: of one sequence alone, by its guesses, in seconds, the newest last.
        line: of all.
        before: guesses of the step before, and those that it asked for.
    """

    recent: list[deque[float]] = field(default_factory=lambda: [deque(maxlen=RECENT) for _ in range(MOST_TIMED + 1)])
    line: CostLine = field(default_factory=CostLine)
    before: tuple[int, int] = (-1, -1)

    def note(self, guesses: int, taken_s: float, *, proposed: int) -> None:
        """A step of one sequence was answered. It counts if it asked for as many guesses as it had, and so did the one before it:
        what runs ahead of a plain step began in that.

        Args:
            guesses: that were verified.
            taken_s: since the answer before.
            proposed: guesses that came with the answer.
        """
        steady = guesses == proposed and (guesses > 0 or self.before == (0, 0))
        self.before = guesses, proposed
        if steady and guesses <= MOST_TIMED:
            self.recent[guesses].append(taken_s)

    def known(self, guesses: int) -> bool:
        """Whether steps with so many were timed."""
        return len(self.recent[guesses]) >= KNOWN

    def seconds(self, guesses: int) -> float:
        """The median of the last times."""
        return median(self.recent[guesses])

    def alone(self, counted: Sequence[float]) -> list[float]:
        """What steps of one sequence with 0, 1 ... guesses take: as timed; between two that were timed in proportion; above them
        as counted, on the scale of the last one, but no less than the line through the last two says.

        Args:
            counted: their costs by count.
        """
        known = [count for count in range(len(counted)) if self.known(count)]
        if not known or known[0]:
            return [*counted]
        found = []
        for count, cost in enumerate(counted):
            low = max(each for each in known if each <= count)
            high = next((each for each in known if each >= count), None)
            low_s = self.seconds(low)
            if high is None:
                before = max((each for each in known if each < low), default=low)
                slope = (low_s - self.seconds(before)) / max(1, low - before)
                found.append(max(cost * low_s / counted[low], low_s + slope * (count - low)))
            else:
                share = (count - low) / max(1, high - low)
                found.append(low_s + share * (self.seconds(high) - low_s))
        return found
