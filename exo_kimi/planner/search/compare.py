"""What else could be done: neighbouring splits, other objectives, machines and recipes, each with its numbers; no text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from exo_kimi.planner.machines.cluster import MOST_MACHINES, Cluster
from exo_kimi.planner.machines.hardware import Machine, machines_by_memory
from exo_kimi.planner.search.cost import Placed, Prediction, predict
from exo_kimi.planner.search.search import best_split, time_s
from exo_kimi.planner.search.tables import need_table
from exo_kimi.planner.weights.bytes import ModelBytes, bytes_of_recipe
from exo_kimi.planner.weights.recipes import load_recipe, recipe_names
from exo_kimi.planner.workload import OBJECTIVES, Objective, Workload

NEIGHBOURS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A labelled possibility: its stages and promises, or None where nothing fits."""

    label: str
    stages: tuple[Placed, ...] | None
    prediction: Prediction | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    """A split with one boundary moved: seconds of the objective, and bytes that machines lack for it."""

    counts: tuple[int, ...]
    seconds: float
    missing_bytes: tuple[tuple[str, int], ...]


def choose(label: str, model: ModelBytes, cluster: Cluster, workload: Workload, objective: Objective) -> Choice:
    """The best split under a label."""
    stages = best_split(model, cluster, workload, objective)
    prediction = None if stages is None else predict(model, cluster, stages, workload)
    return Choice(label=label, stages=stages, prediction=prediction)


def objectives(model: ModelBytes, cluster: Cluster, workload: Workload) -> tuple[Choice, ...]:
    """The best split of each objective; throughput is that of at least one sequence per machine, as `plan` has it."""
    many = replace(workload, concurrency=max(workload.concurrency, len(cluster.machines)))
    return tuple(
        choose(objective, model, cluster, many if objective == "throughput" else workload, objective)
        for objective in OBJECTIVES
    )


def neighbours(
    model: ModelBytes, cluster: Cluster, workload: Workload, objective: Objective, stages: Sequence[Placed]
) -> tuple[tuple[Neighbour, ...], ...]:
    """For each boundary, the splits around it: the same machines, up to two layers moved; the chosen one among them."""
    need = need_table(model, workload)
    return tuple(
        tuple(_moved(model, cluster, workload, objective, stages, boundary, need.tolist()))
        for boundary in range(1, len(stages))
    )


def alone(model: ModelBytes, cluster: Cluster, workload: Workload, objective: Objective) -> Choice | None:
    """The machine of the cluster that is best alone with its wired limit raised; None when none can hold the model."""
    choices = [
        choose(machine.name, model, _only(cluster, machine.name).with_raised_limits(), workload, objective)
        for machine in cluster.machines
    ]
    able = [choice for choice in choices if choice.prediction is not None]
    return min(able, key=lambda choice: choice.prediction.tpot_s if choice.prediction else 0.0, default=None)


def without_each(
    model: ModelBytes, cluster: Cluster, workload: Workload, objective: Objective, stages: Sequence[Placed]
) -> tuple[Choice, ...]:
    """The best split without each machine that the plan uses."""
    if len(cluster.machines) == 1:
        return ()
    return tuple(
        choose(stage.machine.name, model, cluster.without(stage.machine.name), workload, objective) for stage in stages
    )


def one_more(model: ModelBytes, cluster: Cluster, workload: Workload, objective: Objective) -> tuple[Choice, ...]:
    """The best split with one machine more: another of the largest in the cluster, and the largest that is sold."""
    if len(cluster.machines) >= MOST_MACHINES:
        return ()
    raised = any(machine.limit_before_bytes is not None for machine in cluster.machines)
    best = [max(machines, key=_size) for machines in (cluster.machines, machines_by_memory())]
    candidates = {f"{machine.chip} {machine.memory_bytes >> 30} GB": machine for machine in best}
    return tuple(
        choose(
            label,
            model,
            cluster.with_machine(machine.with_raised_limit() if raised else machine),
            workload,
            objective,
        )
        for label, machine in candidates.items()
    )


def recipes(model: ModelBytes, cluster: Cluster, workload: Workload, objective: Objective) -> tuple[Choice, ...]:
    """The best split of the same model in each packaged recipe, the largest first."""
    sized = []
    for name in (*recipe_names(), "uniform-4", "uniform-3"):
        other = replace(bytes_of_recipe(model.config, load_recipe(name), name=name), kv_bits=model.kv_bits)
        sized.append((-other.total_bytes, choose(name, other, cluster, workload, objective)))
    return tuple(choice for _, choice in sorted(sized, key=lambda pair: (pair[0], pair[1].label)))


def _moved(
    model: ModelBytes,
    cluster: Cluster,
    workload: Workload,
    objective: Objective,
    stages: Sequence[Placed],
    boundary: int,
    need: list[list[int]],
) -> Iterator[Neighbour]:
    left, right = stages[boundary - 1], stages[boundary]
    for cut in range(left.end_layer - NEIGHBOURS, left.end_layer + NEIGHBOURS + 1):
        if not left.start_layer < cut < right.end_layer:
            continue
        moved = list(stages)
        moved[boundary - 1] = Placed(machine=left.machine, start_layer=left.start_layer, end_layer=cut)
        moved[boundary] = Placed(machine=right.machine, start_layer=cut, end_layer=right.end_layer)
        over = ((s.machine.name, need[s.start_layer][s.end_layer] - s.machine.limit_bytes) for s in moved)
        yield Neighbour(
            counts=tuple(stage.end_layer - stage.start_layer for stage in moved),
            seconds=time_s(model, cluster, workload, objective, moved),
            missing_bytes=tuple((name, missing) for name, missing in over if missing > 0),
        )


def _size(machine: Machine) -> tuple[float, ...]:
    return machine.memory_bytes, machine.bandwidth.number


def _only(cluster: Cluster, name: str) -> Cluster:
    return cluster.without(*(machine.name for machine in cluster.machines if machine.name != name))
