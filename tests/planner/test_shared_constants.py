"""Numbers that the planner shares with rooms that it must not import."""

from __future__ import annotations

from inspect import signature

from exo_kimi.models import ops
from exo_kimi.planner.workload import CACHE_STEP, SCORE_BYTES, Workload
from exo_kimi.runtime.engine.engine import Engine


def test_caches_grow_as_the_planner_thinks() -> None:
    assert ops.CACHE_STEP == CACHE_STEP


def test_scores_are_bounded_as_the_planner_thinks() -> None:
    assert ops.SCRATCH_BYTES == SCORE_BYTES


def test_prompts_are_cut_as_the_planner_thinks() -> None:
    assert signature(Engine).parameters["prefill_chunk"].default == Workload().prefill_chunk
