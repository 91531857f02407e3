"""The exact solver: contiguous ranges of layers over any order of any subset of machines.

Costs are whole numbers, so that sums are exact and the same problem has the same answer on every machine. A split has a
`total` (of all stages and hops) and a `peak` (the greatest of them); a goal combines the two and never falls when one grows.

For a bound on the peak, the least total is found by dynamic programming over (set of machines, last machine, layers placed):
2^8 * 8 * 62 states of K2 on 8 different machines, each set extended by all cuts at once. Sets that differ only by swapping
equal machines are one, so n equal machines have n sets. The best (total, peak) is found by branch and bound over the bound:
totals only grow as it falls.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]
INFINITE = 1 << 60
Goal = Callable[[int, int], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitProblem:
    """What each machine costs for each range; L layers, n machines.

    Args:
        total: (n, L+1, L+1), cost of layers [start, end) on a machine, INFINITE where it must not hold them.
        peak: (n, L+1, L+1), what the range contributes to the peak.
        hop_total: (n, n), cost of a boundary from one machine to the next.
        hop_peak: (n, n), what it contributes to the peak.
        kinds: equal numbers for machines that may be swapped; the one with the lower index is used first.
        stages: exact number of stages, or 0 for any.
    """

    total: Int64s
    peak: Int64s
    hop_total: Int64s
    hop_peak: Int64s
    kinds: tuple[int, ...]
    stages: int = 0

    @property
    def layers(self) -> int:
        """Layers to place."""
        return int(self.total.shape[1]) - 1

    @property
    def machines(self) -> int:
        """Machines at hand."""
        return int(self.total.shape[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Machines in the order of layers, with the first layer of each and one past the last."""

    order: tuple[int, ...]
    cuts: tuple[int, ...]
    total: int
    peak: int
    value: int = field(default=0, compare=False)


def solve(problem: SplitProblem, goal: Goal) -> Split | None:
    """The split with the least goal(total, peak); None when there is none. Of equals, the first of a fixed order.

    Args:
        problem: the costs.
        goal: never falls when the total or the peak grows.
    """
    masks = _masks(problem)
    loosest = _least_total(problem, masks, INFINITE - 1)
    if loosest is None:
        return None
    best = _valued(loosest, goal)
    if goal(loosest.total, 0) >= best.value:
        return best
    levels = np.union1d(problem.peak[problem.total < INFINITE], problem.hop_peak)
    low = int(np.searchsorted(levels, _least_peak(problem, masks, levels)))
    if goal(loosest.total, int(levels[low])) >= best.value:
        return best
    tightest = _least_total(problem, masks, int(levels[low]))
    if tightest is not None:
        best = min(best, _valued(tightest, goal), key=lambda split: split.value)
        low += 1
    pending = [(low, int(np.searchsorted(levels, loosest.peak)), loosest.total)]
    while pending:
        start, end, least_total = pending.pop()
        # Peaks from here on are worth a look only below the first level at which even the least total is no better.
        useful = bisect_left(range(end), best.value, lo=start, key=lambda at: goal(least_total, int(levels[at])))
        if start >= useful:
            continue
        middle = (start + 3 * useful) // 4
        found = _least_total(problem, masks, int(levels[middle]))
        if found is None:
            pending.append((middle + 1, useful, least_total))
            continue
        found = _valued(found, goal)
        if found.value < best.value:
            best = found
        pending.append((middle + 1, useful, least_total))
        pending.append((start, int(np.searchsorted(levels, found.peak)), found.total))
    return best


def _valued(split: Split, goal: Goal) -> Split:
    return Split(
        order=split.order, cuts=split.cuts, total=split.total, peak=split.peak, value=goal(split.total, split.peak)
    )


def _masks(problem: SplitProblem) -> list[list[int]]:
    """Sets of machines by size, without those that differ from another only by swapping equal machines."""
    n = problem.machines
    before = [0] * n
    for later in range(n):
        for earlier in range(later):
            if problem.kinds[earlier] == problem.kinds[later]:
                before[later] |= 1 << earlier
    by_size: list[list[int]] = [[0]]
    for _ in range(problem.stages or n):
        larger = {
            mask | 1 << machine
            for mask in by_size[-1]
            for machine in range(n)
            if not mask >> machine & 1 and before[machine] & ~mask == 0
        }
        by_size.append(sorted(larger))
    return by_size


def _least_total(problem: SplitProblem, masks: list[list[int]], bound: int) -> Split | None:
    """The split with the least total whose stages and hops are all within the bound on the peak."""
    n, layers = problem.machines, problem.layers
    costs = np.where(problem.peak <= bound, problem.total, INFINITE)
    hops = np.where(problem.hop_peak <= bound, problem.hop_total, INFINITE)
    row = {mask: number for number, mask in enumerate(mask for size in masks for mask in size)}
    # least[row of a set, last, end]: layers [0, end) on exactly these machines, `last` holding the end.
    least = np.full((len(row), n, layers + 1), INFINITE, np.int64)
    for mask in masks[1]:
        machine = mask.bit_length() - 1
        least[row[mask], machine] = costs[machine, 0]
    for size in range(2, len(masks)):
        for machine in range(n):
            grown = [mask for mask in masks[size] if mask >> machine & 1 and mask & ~(1 << machine) in row]
            if not grown:
                continue
            arrived = _arrive(least[[row[mask & ~(1 << machine)] for mask in grown]], hops[:, machine])
            reached = (arrived[:, :, None] + costs[machine][None]).min(axis=1)
            least[[row[mask] for mask in grown], machine] = np.minimum(reached, INFINITE)
    complete = [mask for size in masks[problem.stages or 1 :] for mask in size]
    if not complete:
        return None
    at, machine = divmod(int(least[[row[mask] for mask in complete], :, layers].argmin()), n)
    mask, total = complete[at], int(least[row[complete[at]], machine, layers])
    if total >= INFINITE:
        return None
    # Walk back from the end: which cut and which machine before gave this total.
    order, cuts, end, left = [machine], [layers], layers, total
    while mask != 1 << machine:
        mask &= ~(1 << machine)
        options = least[row[mask]] + hops[:, machine, None] + costs[machine, :, end][None]
        before, start = (int(x) for x in np.argwhere(options == left)[0])
        order.append(before)
        cuts.append(start)
        left, machine, end = int(least[row[mask], before, start]), before, start
    return _named(problem, order[::-1], [0, *cuts[::-1]])


def _arrive(before: Int64s, hops: Int64s) -> Int64s:
    """(sets, cuts): least total up to a cut and over the hop, whatever machine was last."""
    arrived: Int64s = (before + hops[None, :, None]).min(axis=1)
    return np.minimum(arrived, INFINITE)


def _named(problem: SplitProblem, order: list[int], cuts: list[int]) -> Split:
    """A split whose equal machines are named in the order of their use."""
    for kind in set(problem.kinds):
        equal = [place for place, j in enumerate(order) if problem.kinds[j] == kind]
        for place, j in zip(equal, sorted(order[place] for place in equal), strict=True):
            order[place] = j
    return _priced(problem, order, cuts)


def _priced(problem: SplitProblem, order: Sequence[int], cuts: Sequence[int]) -> Split:
    """The split's total and peak in these tables."""
    ranges, hops = list(zip(order, cuts, cuts[1:], strict=False)), list(pairwise(order))
    total = sum(int(problem.total[place]) for place in ranges) + sum(int(problem.hop_total[hop]) for hop in hops)
    peaks = [int(problem.peak[place]) for place in ranges] + [int(problem.hop_peak[hop]) for hop in hops]
    return Split(order=tuple(order), cuts=tuple(cuts), total=total, peak=max(peaks))


def _least_peak(problem: SplitProblem, masks: list[list[int]], levels: Int64s) -> int:
    """A lower bound on the peak of any split, hops left out: bisection over how far each set of machines can reach."""
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        if _reaches(problem, masks, int(levels[middle])):
            high = middle
        else:
            low = middle + 1
    return int(levels[low])


def _reaches(problem: SplitProblem, masks: list[list[int]], bound: int) -> bool:
    """Whether some order of the machines places every layer within the bound, when ranges may shrink freely."""
    allowed = (problem.total < INFINITE) & (problem.peak <= bound)
    ends = np.arange(problem.layers + 1)
    furthest = np.where(allowed, ends[None, None, :], ends[None, :, None]).max(axis=2)
    furthest = np.maximum.accumulate(furthest, axis=1).tolist()
    reach = {0: 0}
    for mask in (mask for size in masks[1:] for mask in size):
        reach[mask] = max(
            furthest[machine][reach[mask & ~(1 << machine)]]
            for machine in range(problem.machines)
            if mask >> machine & 1 and mask & ~(1 << machine) in reach
        )
    return max(reach.values()) == problem.layers
