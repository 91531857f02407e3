"""From a question to its best split, or to what its machines lack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from exo_kimi.planner.machines.hardware import Machine
from exo_kimi.planner.question import Question
from exo_kimi.planner.search.cost import Placed, PlacedSplit
from exo_kimi.planner.search.solver import Split, SplitProblem, solve
from exo_kimi.planner.search.tables import goal_for, least_need_table, shortage_problem, split_problem

# Predictions are not good to a thousandth: within it, machines with more memory come first, since the server runs with
# stage 0. A boundary towards a machine with more memory counts as a thousandth of the least total.
ORDER_SHARE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """A machine and the bytes that it lacks for its range."""

    machine: Machine
    start_layer: int
    end_layer: int
    missing_bytes: int


def best_split(question: Question) -> PlacedSplit | None:
    """The best stages, first layers first; None when nothing fits.

    Exact: the least time over all subsets, orders and cuts, with a thousandth of the stages' time on every boundary towards
    a machine with more memory.
    """
    counts: Sequence[int] = (len(question.order),)
    if question.objective == "throughput" and not question.order:
        counts = range(1, len(question.machines) + 1)
    best: Split | None = None
    for count in counts:
        problem = prefer_order(split_problem(question, stages=count), question.machines)
        found = None if problem is None else solve(problem, goal_for(question, stages=max(count, 1)))
        if found is not None and (best is None or found.value < best.value):
            best = found
    return None if best is None else PlacedSplit(question=question, stages=_placed(best, question))


def prefer_order(problem: SplitProblem, machines: Sequence[Machine]) -> SplitProblem | None:
    """The problem with a thousandth of its least total on each boundary towards more memory; None when nothing fits."""
    least = solve(problem, lambda total, peak: total)
    if least is None:
        return None
    sizes = np.array([machine.memory_bytes for machine in machines], np.int64)
    upward = (sizes[:, None] < sizes[None, :]).astype(np.int64)
    return replace(problem, hop_total=problem.hop_total + upward * (least.total // ORDER_SHARE))


def fits(question: Question) -> bool:
    """Whether any split fits, whatever the objective."""
    simple = replace(question, objective="latency")
    return solve(split_problem(simple), goal_for(simple)) is not None


def least_shortage(question: Question) -> tuple[Shortage, ...]:
    """Machines and what they lack in the split with the least sum of all missing bytes and of the most missing anywhere.

    Empty when a split fits.
    """
    split = solve(shortage_problem(question), lambda total, peak: total + peak)
    if split is None:
        raise AssertionError("a shortage forbids nothing")
    need = {machine.name: least_need_table(question, machine) for machine in question.machines}
    found = (
        Shortage(
            machine=stage.machine,
            start_layer=stage.start_layer,
            end_layer=stage.end_layer,
            missing_bytes=int(need[stage.machine.name][stage.start_layer, stage.end_layer]) - stage.machine.limit_bytes,
        )
        for stage in _placed(split, question)
    )
    return tuple(shortage for shortage in found if shortage.missing_bytes > 0)


def _placed(split: Split, question: Question) -> tuple[Placed, ...]:
    return tuple(
        Placed(machine=question.machines[index], start_layer=start, end_layer=end)
        for index, start, end in zip(split.order, split.cuts, split.cuts[1:], strict=False)
    )
