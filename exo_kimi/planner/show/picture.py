"""A plan as text: a bar per machine and what the split promises."""

from __future__ import annotations

from dataclasses import dataclass

from exo_kimi.planner.plan import Plan, PlanStage
from exo_kimi.units import format_bytes, format_gb

WIDTH = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class BarSegment:
    """A part of a machine's memory, as its bar shows it."""

    name: str
    size_bytes: int
    mark: str


def parts_of(stage: PlanStage) -> tuple[BarSegment, ...]:
    """What fills a machine: weights, slots of streamed experts, KV, scratch, reserve (and server), headroom up to the limit, and
    what macOS keeps."""
    slots = BarSegment(name="expert slots", size_bytes=stage.expert_cache_bytes, mark="▞")
    return (
        BarSegment(name="weights", size_bytes=stage.weight_bytes, mark="█"),
        *((slots,) if stage.expert_slots is not None else ()),
        BarSegment(name="KV", size_bytes=stage.kv_bytes, mark="▓"),
        BarSegment(name="scratch", size_bytes=stage.scratch_bytes, mark="▒"),
        BarSegment(name="reserve", size_bytes=stage.reserve_bytes + stage.server_bytes, mark="░"),
        BarSegment(name="headroom", size_bytes=max(stage.headroom_bytes, 0), mark="·"),
        BarSegment(name="macOS", size_bytes=stage.memory_bytes - max(stage.limit_bytes, stage.need_bytes), mark=" "),
    )


def bar(stage: PlanStage, *, largest_bytes: int, width: int = WIDTH) -> str:
    """A bar in the scale of the largest machine; `|` marks the limit. Every part that is not empty shows at least once.

    Args:
        stage: of the plan.
        largest_bytes: memory of the largest machine, which takes the whole width.
        width: characters.
    """
    cells = ""
    reached_bytes = 0
    for part in parts_of(stage):
        if part.name == "macOS":
            cells += "|"
        reached_bytes += part.size_bytes
        end = min(round(reached_bytes / largest_bytes * width), width)
        cells += part.mark * max(end - len(cells), 1 if part.size_bytes and part.name != "macOS" else 0)
    return cells


def streamed_line(stage: PlanStage) -> list[str]:
    """What a stage streams; no line where it holds everything."""
    if stage.expert_slots is None:
        return []
    return [
        f"experts from disk: {stage.expert_slots} of each layer have a slot, {format_bytes(stage.expert_cache_bytes)} in all "
        f"(--expert-cache {stage.expert_cache_bytes})"
    ]


def decode_speed(plan: Plan) -> str:
    """`19.1 tokens/s`, or with its band where experts are read from disk."""
    made = plan.prediction
    if not plan.streams:
        return f"{made.decode_tokens_per_s:.1f} tokens/s"
    return f"{made.decode_tokens_per_s:.2f} tokens/s ({made.slow_tokens_per_s:.2f} to {made.fast_tokens_per_s:.2f})"


def context_speeds(plan: Plan) -> str:
    """Speeds at the start and at the end of the context; empty where they are the same to a tenth of a token."""
    first, last = (f"{s:.1f}" for s in (plan.prediction.first_tokens_per_s, plan.prediction.last_tokens_per_s))
    if first == last:
        return ""
    return f"{first} tokens/s at the start of the context, {last} at its end ({plan.workload.context} tokens)"


def terminal(plan: Plan) -> str:
    """The plan for a terminal: heading, a bar and a line per machine, promises, and what must be done first."""
    largest_bytes = max(stage.memory_bytes for stage in plan.stages)
    sequences = f"{plan.workload.concurrency} sequence{'' if plan.workload.concurrency == 1 else 's'}"
    lines = [
        f"{plan.model.name}: {plan.model.source}, {format_gb(plan.model.total_bytes)}, {plan.model.layers} layers; "
        f"context {plan.workload.context}, {sequences}; best {plan.objective}",
        "",
    ]
    for stage in plan.stages:
        head = f"{stage.machine}  layers {stage.start_layer}:{stage.end_layer} ({stage.layers})"
        short = f", short by {format_bytes(-stage.headroom_bytes)}" if stage.headroom_bytes < 0 else ""
        lines.append(f"{head:<44} {format_bytes(stage.need_bytes)} of {format_bytes(stage.limit_bytes)}{short}")
        lines.append(bar(stage, largest_bytes=largest_bytes).rstrip())
        shown = [f"{part.mark} {part.name} {format_bytes(part.size_bytes)}" for part in parts_of(stage)[:-1]]
        lines += ["  ".join(shown), *streamed_line(stage), ""]
    made = plan.prediction
    lines.append(
        f"predicted: {decode_speed(plan)} for one sequence, first token of "
        f"{plan.workload.prompt_tokens} after {made.ttft_s:.1f} s, "
        f"{plan.workload.new_tokens} tokens after {made.request_s:.1f} s"
    )
    if context_speeds(plan):
        lines.append(f"           {context_speeds(plan)}")
    if plan.workload.concurrency > 1:
        lines.append(f"           {made.throughput_tokens_per_s:.1f} tokens/s for {sequences} together")
    if plan.left_out:
        lines.append(f"left out: {', '.join(plan.left_out)} (the plan is better without)")
    lines += [f"first, on {stage.machine}: {stage.sysctl}" for stage in plan.stages if stage.sysctl]
    lines += [f"assumed: {text}" for text in plan.assumptions]
    return "\n".join(lines) + "\n"
