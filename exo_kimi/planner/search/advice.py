"""The smallest changes that would make a model fit; it knows nothing of how they are shown.

Each is one sentence or block: a shorter context, fewer sequences, a lighter recipe, higher wired limits with their sysctl
lines, one machine more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from exo_kimi.planner.machines.cluster import MOST_MACHINES, Cluster
from exo_kimi.planner.machines.hardware import PANIC_SHARE, machines_by_memory
from exo_kimi.planner.search.compare import neighbours
from exo_kimi.planner.search.cost import Placed
from exo_kimi.planner.search.search import best_split, fits
from exo_kimi.planner.search.tables import need_table
from exo_kimi.planner.weights.bytes import ModelBytes, bytes_of_recipe
from exo_kimi.planner.weights.recipes import load_recipe, recipe_names
from exo_kimi.planner.workload import CACHE_STEP, Objective, Workload
from exo_kimi.units import GIB, format_bytes, format_gb


def changes_that_fit(model: ModelBytes, cluster: Cluster, workload: Workload, objective: Objective) -> tuple[str, ...]:
    """Sentences, the least intrusive change first; empty when no single change is enough."""
    return (
        *_shorter_context(model, cluster, workload),
        *_fewer_sequences(model, cluster, workload),
        *_higher_limits(model, cluster, workload, objective),
        *_lighter_recipe(model, cluster, workload),
        *_another_machine(model, cluster, workload),
    )


def largest_context(model: ModelBytes, cluster: Cluster, workload: Workload) -> int:
    """The longest context, in whole cache steps, that fits; 0 when none does."""
    low, high = 0, model.config.max_position_embeddings // CACHE_STEP
    while low < high:
        middle = (low + high + 1) // 2
        if fits(model, cluster, replace(workload, context=middle * CACHE_STEP)):
            low = middle
        else:
            high = middle - 1
    return low * CACHE_STEP


def raised_split(
    model: ModelBytes, cluster: Cluster, workload: Workload, objective: Objective
) -> tuple[Placed, ...] | None:
    """The best split when every wired limit may be raised to its ceiling."""
    return best_split(model, cluster.with_raised_limits(), workload, objective)


def limit_lines(model: ModelBytes, workload: Workload, stages: tuple[Placed, ...]) -> tuple[str, ...]:
    """For each machine of a raised split that is over its limit: the sysctl line, its share of memory and a warning."""
    need = need_table(model, workload)
    lines = []
    for stage in stages:
        machine = stage.machine
        need_bytes = int(need[stage.start_layer, stage.end_layer])
        before = machine.limit_bytes if machine.limit_before_bytes is None else machine.limit_before_bytes
        if need_bytes <= before:
            continue
        limit_bytes = min(-(-need_bytes // GIB) * GIB, machine.limit_bytes)
        share = limit_bytes / machine.memory_bytes
        warning = "; above 90 % kernel panics have been reported" if share > PANIC_SHARE else ""
        line = f"on {machine.name}: sudo sysctl iogpu.wired_limit_mb={limit_bytes // (1 << 20)}"
        lines.append(f"{line}   ({share:.1%} of its memory{warning})")
    return tuple(lines)


def _shorter_context(model: ModelBytes, cluster: Cluster, workload: Workload) -> Iterator[str]:
    context = largest_context(model, cluster, workload)
    if context >= workload.context or context <= CACHE_STEP:
        return
    yield f"a context of {context} tokens instead of {workload.context}: --context {context}"


def _fewer_sequences(model: ModelBytes, cluster: Cluster, workload: Workload) -> Iterator[str]:
    for concurrency in range(workload.concurrency - 1, 0, -1):
        if fits(model, cluster, replace(workload, concurrency=concurrency)):
            yield f"{concurrency} sequences of full length instead of {workload.concurrency}: --concurrency {concurrency}"
            return


def _higher_limits(model: ModelBytes, cluster: Cluster, workload: Workload, objective: Objective) -> Iterator[str]:
    stages = raised_split(model, cluster, workload, objective)
    if stages is None:
        return
    split = " / ".join(f"{stage.end_layer - stage.start_layer} on {stage.machine.name}" for stage in stages)
    lines = limit_lines(model, workload, stages)
    raised = f"{len(lines)} wired limit{'' if len(lines) == 1 else 's'} raised (--raise-limits): {split} then fits"
    yield "\n      ".join([raised, *lines, *_cannot_be(model, cluster, workload, objective, stages)])


def _cannot_be(
    model: ModelBytes, cluster: Cluster, workload: Workload, objective: Objective, stages: tuple[Placed, ...]
) -> Iterator[str]:
    """Neighbours of a raised split that are over a limit even so."""
    for table in neighbours(model, cluster.with_raised_limits(), workload, objective, stages):
        for row in table:
            over = " and ".join(f"{name} would be short by {format_bytes(size)}" for name, size in row.missing_bytes)
            if over:
                yield f"{','.join(map(str, row.counts))} cannot be even so: {over}"


def _lighter_recipe(model: ModelBytes, cluster: Cluster, workload: Workload) -> Iterator[str]:
    recipes = [load_recipe(name) for name in (*recipe_names(), *(f"uniform-{bits}" for bits in (2, 3, 4, 5, 6)))]
    sized = [
        (replace(bytes_of_recipe(model.config, recipe, name=model.name), kv_bits=model.kv_bits), recipe)
        for recipe in recipes
    ]
    sized.sort(key=lambda pair: -pair[0].total_bytes)
    for lighter, recipe in sized:
        if lighter.total_bytes < model.total_bytes and fits(lighter, cluster, workload):
            yield f"a lighter recipe: {recipe.name} ({recipe.title}), {format_gb(lighter.total_bytes)}"
            return


def _another_machine(model: ModelBytes, cluster: Cluster, workload: Workload) -> Iterator[str]:
    """The fewest further machines of one kind, and of those the smallest."""
    for count in range(1, MOST_MACHINES - len(cluster.machines) + 1):
        for machine in machines_by_memory():
            larger = cluster
            for _ in range(count):
                larger = larger.with_machine(machine)
            if fits(model, larger, workload):
                many = "one machine more" if count == 1 else f"{count} machines more"
                size = format_bytes(machine.limit_bytes)
                yield f"{many}: {machine.name}, or any other with a working-set limit of {size}"
                return
