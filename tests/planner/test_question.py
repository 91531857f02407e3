"""One question: what belongs together travels as one value, and what follows from it is worked out in one place."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from random import Random

import exo_kimi.planner
from exo_kimi.errors import PlanInfeasibleError
from exo_kimi.planner.answer import answer
from exo_kimi.planner.question import Question

LOOSE = {"model", "cluster", "workload", "objective", "stages", "machines", "question", "split"}
DOORS = {"plan_answer"}  # takes what was typed


def test_no_function_takes_apart_what_a_question_holds_together() -> None:
    carried = {}
    for path in Path(exo_kimi.planner.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name not in DOORS:
                names = {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
                carried[f"{path.name}:{node.name}"] = sorted(names & LOOSE)
    assert {where: names for where, names in carried.items() if len(names) > 3} == {}


def test_a_changed_question_leaves_the_first_as_it_was(ask: Callable[..., Question]) -> None:
    question = ask("q34+q6", "m3-ultra-512, m2-ultra-192")
    shorter, raised = question.with_workload(context=8192), question.with_raised_limits()
    assert (shorter.workload.context, question.workload.context) == (8192, 40_960)
    assert shorter.cluster == question.cluster and raised.workload == question.workload
    for machine, higher in zip(question.machines, raised.machines, strict=True):
        assert machine.limit_now_bytes == machine.limit_bytes == higher.limit_now_bytes < higher.limit_bytes


def test_a_stage_of_a_plan_needs_what_the_question_says(random_case: Callable[[Random], Question]) -> None:
    random, planned = Random(6), 0
    for _ in range(25):
        question = random_case(random)
        try:
            found = answer(question)
        except PlanInfeasibleError:
            continue
        planned += 1
        assert found.split.question is question
        for stage in found.plan.stages:
            need = question.need(stage.start_layer, stage.end_layer)
            assert (stage.need_bytes, stage.weight_bytes) == (need.total_bytes, need.weight_bytes)
            assert stage.need_bytes <= stage.limit_bytes
    assert planned > 6
