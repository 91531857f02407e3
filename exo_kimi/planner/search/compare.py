"""Alternatives to a split: neighbouring splits, other objectives, machines and recipes, each with its numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from exo_kimi.planner.machines.cluster import MOST_MACHINES, Cluster
from exo_kimi.planner.machines.hardware import Machine, machines_by_memory
from exo_kimi.planner.question import Question
from exo_kimi.planner.search.cost import PlacedSplit
from exo_kimi.planner.search.search import best_split
from exo_kimi.planner.weights.bytes import ModelBytes, bytes_of_recipe
from exo_kimi.planner.weights.recipes import load_recipe, recipe_names
from exo_kimi.planner.workload import OBJECTIVES

NEIGHBOURS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A labelled possibility: its best split, or None where nothing fits."""

    label: str
    split: PlacedSplit | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    """A split with one boundary moved: seconds of the objective, and bytes that machines lack for it."""

    counts: tuple[int, ...]
    seconds: float
    missing_bytes: tuple[tuple[str, int], ...]


def objectives(question: Question) -> tuple[Alternative, ...]:
    """The best split of each objective; throughput is that of at least one sequence per machine, as `plan` has it."""
    sequences = max(question.workload.concurrency, len(question.machines))
    return tuple(
        _best(
            objective,
            replace(
                question.with_workload(concurrency=sequences) if objective == "throughput" else question,
                objective=objective,
            ),
        )
        for objective in OBJECTIVES
    )


def neighbours(split: PlacedSplit) -> tuple[tuple[Neighbour, ...], ...]:
    """For each boundary, the splits around it: the same machines, up to two layers moved; the chosen one among them."""
    return tuple(tuple(_moved(split, boundary)) for boundary in range(1, len(split.stages)))


def alone(question: Question) -> Alternative | None:
    """The machine of the cluster that is best alone with its wired limit raised; None when none can hold the whole model."""
    alternatives = [
        _best(
            machine.name, replace(question.resident, cluster=_only(question.cluster, machine.name)).with_raised_limits()
        )
        for machine in question.machines
    ]
    able = [(each.split.prediction.tpot_s, each) for each in alternatives if each.split is not None]
    return min(able, key=lambda pair: pair[0])[1] if able else None


def without_each(split: PlacedSplit) -> tuple[Alternative, ...]:
    """The best split without each machine that this one uses."""
    question = split.question
    if len(question.machines) == 1:
        return ()
    names = [stage.machine.name for stage in split.stages]
    return tuple(_best(name, replace(question, cluster=question.cluster.without(name))) for name in names)


def one_more(question: Question) -> tuple[Alternative, ...]:
    """The best split with one machine more: another of the largest in the cluster, and the largest that is sold."""
    if len(question.machines) >= MOST_MACHINES:
        return ()
    raised = any(machine.limit_before_bytes is not None for machine in question.machines)
    best = [max(machines, key=_size) for machines in (question.machines, machines_by_memory())]
    candidates = {f"{machine.chip} {machine.memory_bytes >> 30} GB": machine for machine in best}
    return tuple(
        _best(
            label,
            replace(
                question, cluster=question.cluster.with_machine(machine.with_raised_limit() if raised else machine)
            ),
        )
        for label, machine in candidates.items()
    )


def raised_limits(question: Question) -> Alternative:
    """The best split when every wired limit may be raised to its ceiling."""
    return _best("raised", question.with_raised_limits())


def recipes(question: Question) -> tuple[Alternative, ...]:
    """The best split of the same model in each packaged recipe, the largest first."""
    model, sized = question.model, []
    for name in (*recipe_names(), "uniform-4", "uniform-3"):
        other = model.with_weights(bytes_of_recipe(model.config, load_recipe(name), name=name))
        sized.append((-other.total_bytes, _best(name, replace(question, model=other))))
    return tuple(alternative for _, alternative in sorted(sized, key=lambda pair: (pair[0], pair[1].label)))


def form(question: Question, label: str, model: ModelBytes) -> Alternative:
    """The best split of another form of the same model."""
    return _best(label, replace(question, model=model))


def _best(label: str, question: Question) -> Alternative:
    return Alternative(label=label, split=best_split(question))


def _moved(split: PlacedSplit, boundary: int) -> Iterator[Neighbour]:
    left, right = split.stages[boundary - 1], split.stages[boundary]
    for cut in range(left.end_layer - NEIGHBOURS, left.end_layer + NEIGHBOURS + 1):
        if not left.start_layer < cut < right.end_layer:
            continue
        stages = list(split.stages)
        stages[boundary - 1 : boundary + 1] = [replace(left, end_layer=cut), replace(right, start_layer=cut)]
        moved = replace(split, stages=tuple(stages))
        held = ((s.machine, split.question.held(s.machine, s.start_layer, s.end_layer)) for s in stages)
        over = ((machine.name, need.total_bytes - machine.limit_bytes) for machine, need in held)
        yield Neighbour(
            counts=moved.counts,
            seconds=moved.objective_s,
            missing_bytes=tuple((name, missing) for name, missing in over if missing > 0),
        )


def _size(machine: Machine) -> tuple[float, ...]:
    return machine.memory_bytes, machine.bandwidth.number


def _only(cluster: Cluster, name: str) -> Cluster:
    return cluster.without(*(machine.name for machine in cluster.machines if machine.name != name))
