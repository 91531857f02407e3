"""The smallest changes that would make a model fit.

Each is one sentence or block: a shorter context, fewer sequences, a lighter recipe, higher wired limits with their sysctl
lines, one machine more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from exo_kimi.planner.machines.cluster import MOST_MACHINES
from exo_kimi.planner.machines.hardware import PANIC_SHARE, machines_by_memory
from exo_kimi.planner.question import Question
from exo_kimi.planner.search.compare import neighbours, raised_limits
from exo_kimi.planner.search.cost import PlacedSplit
from exo_kimi.planner.search.search import best_split, fits
from exo_kimi.planner.streaming import Streaming, default_curve
from exo_kimi.planner.weights.bytes import bytes_of_recipe
from exo_kimi.planner.weights.recipes import load_recipe, recipe_names
from exo_kimi.planner.workload import CACHE_STEP
from exo_kimi.units import GIB, format_bytes, format_gb


def changes_that_fit(question: Question) -> tuple[str, ...]:
    """Sentences, the least intrusive change first; empty when no single change is enough."""
    return (
        *_shorter_context(question),
        *_fewer_sequences(question),
        *_higher_limits(question),
        *_lighter_recipe(question),
        *_experts_from_disk(question),
        *_another_machine(question),
    )


def largest_context(question: Question) -> int:
    """The longest context, in whole cache steps, that fits; 0 when none does."""
    low, high = 0, question.model.config.max_position_embeddings // CACHE_STEP
    while low < high:
        middle = (low + high + 1) // 2
        if fits(question.with_workload(context=middle * CACHE_STEP)):
            low = middle
        else:
            high = middle - 1
    return low * CACHE_STEP


def limit_lines(split: PlacedSplit) -> tuple[str, ...]:
    """For each machine of a raised split that is over its limit: the sysctl line, its share of memory and a warning."""
    lines = []
    for stage in split.stages:
        machine = stage.machine
        need_bytes = split.question.held(machine, stage.start_layer, stage.end_layer).total_bytes
        if need_bytes <= machine.limit_now_bytes:
            continue
        limit_bytes = min(-(-need_bytes // GIB) * GIB, machine.limit_bytes)
        share = limit_bytes / machine.memory_bytes
        warning = "; above 90 % kernel panics have been reported" if share > PANIC_SHARE else ""
        line = f"on {machine.name}: sudo sysctl iogpu.wired_limit_mb={limit_bytes // (1 << 20)}"
        lines.append(f"{line}   ({share:.1%} of its memory{warning})")
    return tuple(lines)


def _shorter_context(question: Question) -> Iterator[str]:
    context, wanted = largest_context(question), question.workload.context
    if context >= wanted or context <= CACHE_STEP:
        return
    yield f"a context of {context} tokens instead of {wanted}: --context {context}"


def _fewer_sequences(question: Question) -> Iterator[str]:
    wanted = question.workload.concurrency
    for concurrency in range(wanted - 1, 0, -1):
        if fits(question.with_workload(concurrency=concurrency)):
            yield f"{concurrency} sequences of full length instead of {wanted}: --concurrency {concurrency}"
            return


def _higher_limits(question: Question) -> Iterator[str]:
    split = raised_limits(question).split
    if split is None:
        return
    shares = " / ".join(f"{stage.layers} on {stage.machine.name}" for stage in split.stages)
    lines = limit_lines(split)
    raised = f"{len(lines)} wired limit{'' if len(lines) == 1 else 's'} raised (--raise-limits): {shares} then fits"
    yield "\n      ".join([raised, *lines, *_cannot_be(split)])


def _cannot_be(raised: PlacedSplit) -> Iterator[str]:
    """Neighbours of a raised split that are over a limit even so."""
    for table in neighbours(raised):
        for row in table:
            over = " and ".join(f"{name} would be short by {format_bytes(size)}" for name, size in row.missing_bytes)
            if over:
                yield f"{','.join(map(str, row.counts))} cannot be even so: {over}"


def _lighter_recipe(question: Question) -> Iterator[str]:
    model = question.model
    recipes = [load_recipe(name) for name in (*recipe_names(), *(f"uniform-{bits}" for bits in (2, 3, 4, 5, 6)))]
    sized = [(model.with_weights(bytes_of_recipe(model.config, recipe, name=model.name)), recipe) for recipe in recipes]
    sized.sort(key=lambda pair: -pair[0].total_bytes)
    for lighter, recipe in sized:
        if lighter.total_bytes < model.total_bytes and fits(replace(question, model=lighter)):
            yield f"a lighter recipe: {recipe.name} ({recipe.title}), {format_gb(lighter.total_bytes)}"
            return


def _experts_from_disk(question: Question) -> Iterator[str]:
    """The same weights with experts read from disk, where a disk's speed is known and everything else fits."""
    if question.workload.ends_everywhere or not any(question.model.expert_bytes):
        return
    unknown = [machine.name for machine in question.machines if machine.ssd is None]
    if question.streaming is not None:
        if unknown and fits(replace(question, cluster=question.cluster.with_ssd(1e9))):
            yield (
                f"the speed of a disk, which nobody has published of {', '.join(unknown)}: --ssd 6GB/s, say; "
                "`exo-kimi machine --measure` says it"
            )
        return
    asked = replace(question, streaming=Streaming(curve=default_curve()))
    split = best_split(asked)
    if split is not None:
        ends = [split.at(case).prediction.decode_tokens_per_s for case in ("slow", "fast")]
        yield (
            f"experts from disk: --stream, about {split.prediction.decode_tokens_per_s:.1f} tokens/s "
            f"({ends[0]:.1f} to {ends[1]:.1f})"
        )
    elif unknown and fits(replace(asked, cluster=asked.cluster.with_ssd(1e9))):
        yield "experts from disk: --stream --ssd SPEED (such as 6GB/s; `exo-kimi machine --measure` says it)"


def _another_machine(question: Question) -> Iterator[str]:
    """The fewest further machines of one kind, and of those the smallest; in any order."""
    question = replace(question.resident, order=())
    for count in range(1, MOST_MACHINES - len(question.machines) + 1):
        for machine in machines_by_memory():
            larger = question.cluster
            for _ in range(count):
                larger = larger.with_machine(machine)
            if fits(replace(question, cluster=larger)):
                many = "one machine more" if count == 1 else f"{count} machines more"
                size = format_bytes(machine.limit_bytes)
                yield f"{many}: {machine.name}, or any other with a working-set limit of {size}"
                return
