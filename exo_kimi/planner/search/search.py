"""From model, cluster and workload to the best split; it knows nothing of plan files or pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from exo_kimi.planner.machines.cluster import Cluster
from exo_kimi.planner.machines.hardware import Machine
from exo_kimi.planner.search.cost import Placed, predict
from exo_kimi.planner.search.solver import SplitProblem, Split, solve
from exo_kimi.planner.search.tables import goal_for, need_table, problem_for, shortage_problem
from exo_kimi.planner.weights.bytes import ModelBytes
from exo_kimi.planner.workload import Objective, Workload

# Predictions are not good to a thousandth: within it, machines with more memory come first, since the server runs with
# stage 0. A boundary towards a machine with more memory counts as a thousandth of the least total.
ORDER_SHARE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Short:
    """A machine and the bytes that it lacks for its range."""

    machine: Machine
    start_layer: int
    end_layer: int
    missing_bytes: int


def best_split(
    model: ModelBytes, cluster: Cluster, workload: Workload, objective: Objective
) -> tuple[Placed, ...] | None:
    """The best stages, first layers first; None when nothing fits.

    Exact: the least time over all subsets, orders and cuts, with a thousandth of the stages' time on every boundary towards
    a machine with more memory.
    """
    counts = range(1, len(cluster.machines) + 1) if objective == "throughput" else (0,)
    best: Split | None = None
    for count in counts:
        goal = goal_for(objective, workload, stages=max(count, 1))
        problem = prefer_order(problem_for(model, cluster, workload, objective, stages=count), cluster.machines)
        found = None if problem is None else solve(problem, goal)
        if found is not None and (best is None or found.value < best.value):
            best = found
    return None if best is None else _placed(best, cluster)


def prefer_order(problem: SplitProblem, machines: Sequence[Machine]) -> SplitProblem | None:
    """The problem with a thousandth of its least total on each boundary towards more memory; None when nothing fits."""
    least = solve(problem, lambda total, peak: total)
    if least is None:
        return None
    sizes = np.array([machine.memory_bytes for machine in machines], np.int64)
    upward = (sizes[:, None] < sizes[None, :]).astype(np.int64)
    return replace(problem, hop_total=problem.hop_total + upward * (least.total // ORDER_SHARE))


def fits(model: ModelBytes, cluster: Cluster, workload: Workload) -> bool:
    """Whether any split fits."""
    problem = problem_for(model, cluster, workload, "latency")
    return solve(problem, goal_for("latency", workload)) is not None


def least_shortage(model: ModelBytes, cluster: Cluster, workload: Workload) -> tuple[Short, ...]:
    """Machines and what they lack in the split with the least sum of all missing bytes and of the most missing anywhere.

    Empty when a split fits.
    """
    split = solve(shortage_problem(model, cluster, workload), lambda total, peak: total + peak)
    assert split is not None, "a shortage forbids nothing"
    need = need_table(model, workload)
    found = (
        Short(
            machine=stage.machine,
            start_layer=stage.start_layer,
            end_layer=stage.end_layer,
            missing_bytes=int(need[stage.start_layer, stage.end_layer]) - stage.machine.limit_bytes,
        )
        for stage in _placed(split, cluster)
    )
    return tuple(short for short in found if short.missing_bytes > 0)


def time_s(
    model: ModelBytes, cluster: Cluster, workload: Workload, objective: Objective, stages: Sequence[Placed]
) -> float:
    """What the objective minimises, in seconds; for `throughput` the seconds of one round of all sequences."""
    prediction = predict(model, cluster, stages, workload)
    return {
        "request": prediction.request_s,
        "latency": prediction.tpot_s,
        "ttft": prediction.ttft_s,
        "throughput": workload.concurrency / prediction.throughput_tokens_per_s,
    }[objective]


def _placed(split: Split, cluster: Cluster) -> tuple[Placed, ...]:
    return tuple(
        Placed(machine=cluster.machines[index], start_layer=start, end_layer=end)
        for index, start, end in zip(split.order, split.cuts, split.cuts[1:], strict=False)
    )
