"""Golden plans of `shard_plans/`, made again byte for byte by a test: `python -m exo_kimi.planner.show.golden [DIR]`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from exo_kimi.errors import PlanInfeasibleError
from exo_kimi.planner.answer import Answer
from exo_kimi.planner.command import plan_answer

FOUNDING = "m3-ultra-512, m2-ultra-192"
SPEED_CONTEXTS = (4_096, 40_960, 131_072)
# File name: model, recipe, cluster.
PLANS = {
    "founding-int4": ("kimi-k2.6", "int4", FOUNDING),
    "founding-int4-q8": ("kimi-k2.6", "int4+q8", FOUNDING),
    "founding-int4-q6": ("kimi-k2.6", "int4+q6", FOUNDING),
    "founding-uniform-4": ("kimi-k2.6", "uniform-4", FOUNDING),
    "founding-q34-q6": ("kimi-k2.6", "q34+q6", FOUNDING),
    "founding-q34-q6-4k": ("kimi-k2.6", "q34+q6", FOUNDING),
    "founding-q34-q6-131k": ("kimi-k2.6", "q34+q6", FOUNDING),
    "founding-mix": ("kimi-k2.6", "founding", FOUNDING),
    "founding-dq3_k_m-q8": ("kimi-k2.6", "dq3_k_m-q8", FOUNDING),
    "founding-q3-q8": ("kimi-k2.6", "q3+q8", FOUNDING),
    "founding-q3-q6": ("kimi-k2.6", "q3+q6", FOUNDING),
    "founding-uniform-3": ("kimi-k2.6", "uniform-3", FOUNDING),
    "two-m3-ultra-512-int4": ("kimi-k2.6", "int4", "2x m3-ultra-512"),
    "four-m3-ultra-int4": ("kimi-k2.6", "int4", "2x m3-ultra-512, 2x m3-ultra-256"),
    "m3-ultra-512-m4-max-128-q3-q6": ("kimi-k2.6", "q3+q6", "m3-ultra-512, m4-max-128"),
    "one-m3-ultra-512-q3-q6": ("kimi-k2.6", "q3+q6", "m3-ultra-512"),
}
PICTURES = ("founding-q34-q6", "streamed-m3-ultra-512-m2-max-96-int4")
# Experts from disk: file name, and the speed of disks that nobody has published, as --ssd.
STREAMED = {
    "streamed-m3-ultra-512-m2-max-96-int4": ("kimi-k2.6", "int4", "m3-ultra-512, m2-max-96", 5e9),
    "streamed-m4-max-128-q34-q6": ("kimi-k2.6", "q34+q6", "m4-max-128", None),
    "streamed-m3-ultra-256-q34-q6": ("kimi-k2.6", "q34+q6", "m3-ultra-256", 5e9),
}
CONTEXTS = {"founding-q34-q6-4k": SPEED_CONTEXTS[0], "founding-q34-q6-131k": SPEED_CONTEXTS[2]}  # else the default


def golden(name: str) -> Answer:
    """One golden plan: within the default limits if it can be, else with raised ones."""
    if name in STREAMED:
        model, recipe, cluster, ssd = STREAMED[name]
        return plan_answer(model=model, recipe=recipe, cluster=cluster, stream=True, ssd_bytes_per_s=ssd)
    model, recipe, cluster = PLANS[name]
    context = CONTEXTS.get(name)
    try:
        return plan_answer(model=model, recipe=recipe, cluster=cluster, context=context)
    except PlanInfeasibleError:
        return plan_answer(model=model, recipe=recipe, cluster=cluster, context=context, raise_limits=True)


def golden_files() -> dict[str, str]:
    """Every file of shard_plans/ by name, with its text."""
    answers = {name: golden(name) for name in (*PLANS, *STREAMED)}
    files = {f"{name}.json": answer.plan.to_json() for name, answer in answers.items()}
    for name in PICTURES:
        files[f"{name}.svg"] = answers[name].svg
    files["README.md"] = _readme(answers)
    return files


def write(directory: Path) -> None:
    """Write every file."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in golden_files().items():
        (directory / name).write_text(text, encoding="utf-8")


def _readme(answers: dict[str, Answer]) -> str:
    lines = [
        "# Golden plans",
        "",
        "Made by `python -m exo_kimi.planner.show.golden`; a test makes them again byte for byte. Context 40,960 where the name",
        "has no other, one sequence, objective `request` (4,096 tokens in, 512 out). The times are predictions from published",
        "figures, not measurements; `exo-kimi bench plan --published` holds them against what owners measured.",
        "",
        "| plan | split | wired limits to raise (MiB) | tokens/s | at the context's end | first token | request |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in PLANS:
        plan = answers[name].plan
        split = " + ".join(f"{stage.layers} {stage.machine}" for stage in plan.stages)
        raised = ", ".join(f"{s.machine} {s.wired_limit_mb}" for s in plan.stages if s.wired_limit_mb) or "none"
        made = plan.prediction
        lines.append(
            f"| [{name}]({name}.json) | {split} | {raised} | {made.decode_tokens_per_s:.1f} | "
            f"{made.last_tokens_per_s:.1f} | {made.ttft_s:.1f} s | "
            f"{made.request_s:.1f} s |"
        )
    lines += ["", *_speeds(answers), "", *_streamed(answers)]
    pictures = [f"![{answers[name].plan.split}]({name}.svg)" for name in PICTURES]
    return "\n".join([*lines, "", *pictures, ""])


def _streamed(answers: dict[str, Answer]) -> Iterator[str]:
    """What runs only with experts from disk, with the band of its speed."""
    yield "Experts from disk (`--stream`), on machines that cannot hold them; hit rates as others have published, and disks,"
    yield "or 5 GB/s (`--ssd 5GB/s`) where nobody has:"
    yield ""
    yield "| plan | split | slots of 384 | tokens/s | band | first token | request | chunk |"
    yield "|---|---|---|---|---|---|---|---|"
    for name in STREAMED:
        plan, made = answers[name].plan, answers[name].plan.prediction
        split = " + ".join(f"{stage.layers} {stage.machine}" for stage in plan.stages)
        slots = ", ".join("all" if stage.expert_slots is None else str(stage.expert_slots) for stage in plan.stages)
        yield (
            f"| [{name}]({name}.json) | {split} | {slots} | {made.decode_tokens_per_s:.2f} | {made.slow_tokens_per_s:.2f} to "
            f"{made.fast_tokens_per_s:.2f} | {made.ttft_s:.0f} s | {made.request_s:.0f} s | {plan.workload.prefill_chunk} |"
        )


def _speeds(answers: dict[str, Answer]) -> Iterator[str]:
    """The founding plan's speed with so many tokens cached, from the plan of each context."""
    names = {CONTEXTS.get(name, SPEED_CONTEXTS[1]): name for name in PLANS if name.startswith("founding-q34-q6")}
    speeds = {context: answers[names[context]].plan.prediction.last_tokens_per_s for context in SPEED_CONTEXTS}
    yield "The founding plan (`q34+q6`, M3 Ultra 512 GB and M2 Ultra 192 GB), one sequence:"
    yield ""
    yield "| tokens in the context | " + " | ".join(f"{context:,}" for context in speeds) + " |"
    yield "|---|" + "---|" * len(speeds)
    yield "| tokens/s | " + " | ".join(f"{speed:.1f}" for speed in speeds.values()) + " |"


def main(arguments: Sequence[str]) -> None:
    """Write the plans to the directory given, or to shard_plans/."""
    write(Path(arguments[0] if arguments else "shard_plans"))


if __name__ == "__main__":
    main(sys.argv[1:])
