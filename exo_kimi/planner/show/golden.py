"""Golden plans of `shard_plans/`, made again byte for byte by a test: `python -m exo_kimi.planner.show.golden [DIR]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from exo_kimi.errors import PlanInfeasibleError
from exo_kimi.planner.answer import Answer
from exo_kimi.planner.command import plan_answer

FOUNDING = "m3-ultra-512, m2-ultra-192"
# File name: model, recipe, cluster.
PLANS = {
    "founding-int4": ("kimi-k2.6", "int4", FOUNDING),
    "founding-int4-q8": ("kimi-k2.6", "int4+q8", FOUNDING),
    "founding-int4-q6": ("kimi-k2.6", "int4+q6", FOUNDING),
    "founding-uniform-4": ("kimi-k2.6", "uniform-4", FOUNDING),
    "founding-q34-q6": ("kimi-k2.6", "q34+q6", FOUNDING),
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


def golden(name: str) -> Answer:
    """One golden plan: within the default limits if it can be, else with raised ones."""
    model, recipe, cluster = PLANS[name]
    try:
        return plan_answer(model=model, recipe=recipe, cluster=cluster)
    except PlanInfeasibleError:
        return plan_answer(model=model, recipe=recipe, cluster=cluster, raise_limits=True)


def golden_files() -> dict[str, str]:
    """Every file of shard_plans/ by name, with its text."""
    answers = {name: golden(name) for name in PLANS}
    files = {f"{name}.json": answer.plan.to_json() for name, answer in answers.items()}
    files["founding-q34-q6.svg"] = answers["founding-q34-q6"].svg
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
        "Made by `python -m exo_kimi.planner.show.golden`; a test makes them again byte for byte. Context 40,960, one sequence,",
        "objective `request` (4,096 tokens in, 512 out). The times are predictions from published figures, not measurements.",
        "",
        "| plan | split | wired limits to raise (MiB) | tokens/s | first token | request |",
        "|---|---|---|---|---|---|",
    ]
    for name, answer in answers.items():
        plan = answer.plan
        split = " + ".join(f"{stage.layers} {stage.machine}" for stage in plan.stages)
        raised = ", ".join(f"{s.machine} {s.wired_limit_mb}" for s in plan.stages if s.wired_limit_mb) or "none"
        made = plan.prediction
        lines.append(
            f"| [{name}]({name}.json) | {split} | {raised} | {made.decode_tokens_per_s:.1f} | {made.ttft_s:.1f} s | "
            f"{made.request_s:.1f} s |"
        )
    return "\n".join([*lines, "", "![44 | 17](founding-q34-q6.svg)", ""])


def main(arguments: Sequence[str]) -> None:
    """Write the plans to the directory given, or to shard_plans/."""
    write(Path(arguments[0] if arguments else "shard_plans"))


if __name__ == "__main__":
    main(sys.argv[1:])
