"""What a plan says of experts from disk: how much each machine streams, what is assumed, and what would be better."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from exo_kimi.planner.machines.hardware import Machine, Value
from exo_kimi.planner.search.compare import one_more, raised_limits, recipes
from exo_kimi.planner.search.cost import Placed, PlacedSplit, read_bytes_per_token
from exo_kimi.planner.streaming import Case
from exo_kimi.units import GIB, format_bytes

CASES: tuple[Case, ...] = ("slow", "expected", "fast")
# An alternative counts as faster from here on.
BETTER = 1.02
MORE_BYTES = 8 * GIB  # a GiB alone may be less than a slot of each layer


def streamed(split: PlacedSplit) -> Iterator[str]:
    """The lines of an explanation; none where nothing is streamed and nothing could have been."""
    streaming = split.question.streaming
    if streaming is None:
        return
    if not split.streams:
        yield "nothing is streamed: no split that reads experts from disk is better than this one."
        yield from _no_disk(split)
        return
    read = read_bytes_per_token(split)
    for stage, size in zip(split.stages, read, strict=True):
        yield from _stage(split, stage, size)
    yield from _band(split)
    yield f"hit rates: {streaming.curve.source}."
    chunk = split.question.workload.prefill_chunk
    yield f"prompts are taken in chunks of {chunk} tokens: each chunk reads every expert that has no slot."
    yield from _no_disk(split)
    yield from _more_memory(split)
    yield from _alternatives(split)


def _stage(split: PlacedSplit, stage: Placed, read_bytes: float) -> Iterator[str]:
    question, slots, ssd = split.question, split.slots(stage), stage.machine.ssd
    if slots is None or ssd is None or question.streaming is None:
        yield f"{stage.machine.name} holds all experts of its layers."
        return
    counts = [question.model.config.routed_experts(n) for n in range(stage.start_layer, stage.end_layer)]
    least, most = min(filter(None, counts)), max(counts)
    experts = str(most) if least == most else f"{least} to {most}"
    rates = [replace(question.streaming, case=case).hit_rate(float(slots), most) for case in CASES]
    cache_bytes = question.held(stage.machine, stage.start_layer, stage.end_layer).expert_cache_bytes
    yield (
        f"{stage.machine.name}: {slots} of {experts} experts of each layer have a slot ({format_bytes(cache_bytes)}); "
        f"{rates[1]:.0%} of those asked for are there ({rates[0]:.0%} to {rates[2]:.0%})."
    )
    yield (
        f"  a token reads {read_bytes / 1e9:.2f} GB at {ssd.number / 1e9:.1f} GB/s ({ssd.status}), "
        f"{read_bytes / ssd.number:.2f} s of its {split.prediction.tpot_s:.2f} s."
    )


def _band(split: PlacedSplit) -> Iterator[str]:
    slow, own, fast = (split.at(case).prediction.decode_tokens_per_s for case in CASES)
    yield f"tokens/s: {own:.2f}, somewhere between {slow:.2f} and {fast:.2f}:"
    yield f"  {slow:.2f} if experts repeat as little as anywhere and the disk gives half of a published speed,"
    yield f"  {fast:.2f} if they repeat as much as anywhere and all reading hides behind computing."


def _no_disk(split: PlacedSplit) -> Iterator[str]:
    unknown = [machine.name for machine in split.question.machines if machine.ssd is None]
    if unknown:
        yield (
            f"no disk speed is known of {', '.join(unknown)}, which streams nothing: `exo-kimi machine --measure` there, "
            "ssd_bytes_per_s in the cluster file, or --ssd."
        )


def _more_memory(split: PlacedSplit) -> Iterator[str]:
    """What more memory of each machine brings, with the same layers."""
    own = split.prediction.decode_tokens_per_s
    for index, stage in enumerate(split.stages):
        if split.slots(stage) is None:
            continue
        stages = list(split.stages)
        stages[index] = replace(stage, machine=_with_more(stage.machine, MORE_BYTES))
        more = replace(split, stages=tuple(stages)).prediction.decode_tokens_per_s
        gain = more / own - 1
        yield (
            f"{format_bytes(MORE_BYTES)} more on {stage.machine.name}: {more:.2f} tokens/s, {gain:+.1%}; "
            f"about {gain / (MORE_BYTES / GIB):+.2%} for each GiB."
        )


def _alternatives(split: PlacedSplit) -> Iterator[str]:
    """Against a machine more, raised limits and the largest recipe that needs no disk; and which of them is fastest."""
    question, own = split.question, split.prediction.decode_tokens_per_s
    held = [other for other in recipes(question.resident) if other.split is not None]
    found = [(f"one machine more ({other.label})", other) for other in one_more(question)]
    found += [(f"the recipe {other.label}", other) for other in held[:1]]
    if not any(machine.limit_before_bytes is not None for machine in question.machines):
        found.append(("raised wired limits (--raise-limits)", raised_limits(question)))
    better = []
    for label, other in found:
        if other.split is None:
            yield f"{label}: does not fit."
            continue
        speed = other.split.prediction.decode_tokens_per_s
        how = "experts from disk too" if other.split.streams else "every expert held"
        yield f"{label}: {speed:.2f} tokens/s, {how}."
        if speed > own * BETTER:
            better.append((speed, label))
    if not held:
        yield "no packaged recipe fits without streaming."
    if better:
        speed, label = max(better)
        yield f"fastest of these: {label}, {speed / own:.1f} times this plan."
    else:
        yield "fastest of these: this plan."


def _with_more(machine: Machine, size_bytes: int) -> Machine:
    limit = Value(number=machine.limit_bytes + size_bytes, source=machine.limit.source, status=machine.limit.status)
    return replace(machine, limit=limit)
