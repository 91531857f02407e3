"""The terminal view and the SVG: every byte of a machine is in its bar, and both are made the same way each time."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exo_kimi.planner.plan import PlanStage
from exo_kimi.planner.show.golden import PLANS, SPEED_CONTEXTS, golden
from exo_kimi.planner.show.picture import WIDTH, bar, parts_of, terminal
from exo_kimi.planner.show.svg import svg
from exo_kimi.planner.weights.bytes import ModelBytes

SVG = "{http://www.w3.org/2000/svg}"
ModelOf = Callable[[str], ModelBytes]

FOUNDING_TEXT = """\
kimi-k2.6: experts gate/up 3, down 4, rest 6, 497.0 GB, 61 layers; context 40960, 1 sequence; best request

m3-ultra-512  layers 0:44 (44)               347.79 GiB of 384.00 GiB
███████████████████████████████████████▓▒░···|
█ weights 331.93 GiB  ▓ KV 1.93 GiB  ▒ scratch 3.92 GiB  ░ reserve 10.00 GiB  · headroom 36.21 GiB

m2-ultra-192  layers 44:61 (17)              143.90 GiB of 144.00 GiB
███████████████▓▒░·|
█ weights 131.23 GiB  ▓ KV 765.00 MiB  ▒ scratch 3.92 GiB  ░ reserve 8.00 GiB  · headroom 105.76 MiB

predicted: 19.1 tokens/s for one sequence, first token of 4096 after 20.1 s, 512 tokens after 46.9 s
           19.9 tokens/s at the start of the context, 14.1 at its end (40960 tokens)
assumed: m2-ultra-192: overhead per layer: not published; the M3 Ultra's is assumed
assumed: m2-ultra-192: GPU cores: 76 of them; a machine with 60 is m2-ultra-192-60c
"""


def stage_of(**sizes: int) -> PlanStage:
    """A stage with the given bytes."""
    given = {"weight_bytes": 1, "kv_bytes": 0, "scratch_bytes": 0, "reserve_bytes": 0, "server_bytes": 0, **sizes}
    need = sum(given[key] for key in ("weight_bytes", "kv_bytes", "scratch_bytes", "reserve_bytes", "server_bytes"))
    limit = given.pop("limit_bytes", need)
    memory = given.pop("memory_bytes", max(limit, need))
    return PlanStage(
        machine="m",
        chip="c",
        start_layer=0,
        end_layer=1,
        memory_bytes=memory,
        limit_bytes=limit,
        limit_source="test",
        headroom_bytes=limit - need,
        wired_limit_mb=None,
        **given,
    )


def test_the_founding_plan_reads_as_expected() -> None:
    lines = terminal(golden("founding-q34-q6").plan).splitlines()
    assert [line.rstrip() for line in lines] == FOUNDING_TEXT.splitlines()


@pytest.mark.parametrize("name", PLANS)
def test_every_part_of_every_machine_shows(name: str) -> None:
    plan = golden(name).plan
    text = terminal(plan)
    largest_bytes = max(stage.memory_bytes for stage in plan.stages)
    for stage in plan.stages:
        assert sum(part.size_bytes for part in parts_of(stage)) == stage.memory_bytes
        drawn = bar(stage, largest_bytes=largest_bytes)
        assert drawn.rstrip() in text
        assert set("█▓▒░|") <= set(drawn)
        assert len(drawn) <= WIDTH + 5
        assert stage.sysctl is None or stage.sysctl in text


@settings(deadline=None)
@given(
    weight=st.integers(0, 1000),
    kv=st.integers(0, 1000),
    reserve=st.integers(0, 1000),
    limit=st.integers(1, 4000),
    memory=st.integers(4000, 5000),
)
def test_a_bar_shows_every_part_that_is_not_empty(weight: int, kv: int, reserve: int, limit: int, memory: int) -> None:
    stage = stage_of(weight_bytes=weight, kv_bytes=kv, reserve_bytes=reserve, limit_bytes=limit, memory_bytes=memory)
    drawn = bar(stage, largest_bytes=memory)
    assert sum(part.size_bytes for part in parts_of(stage)) == memory
    for mark, size in (("█", weight), ("▓", kv), ("░", reserve), ("·", max(stage.headroom_bytes, 0))):
        assert (mark in drawn) == (size > 0)
    assert drawn.count("|") == 1
    assert WIDTH - 1 <= len(drawn) <= WIDTH + 5


@pytest.mark.parametrize("name", PLANS)
def test_the_svg_is_well_formed_and_its_bars_add_up(name: str) -> None:
    plan = golden(name).plan
    root = ElementTree.fromstring(svg(plan))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    bars = [rect for rect in root.iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None]
    assert len(bars) == 6 * len(plan.stages)
    largest = max(stage.memory_bytes for stage in plan.stages)
    for index, stage in enumerate(plan.stages):
        row = bars[6 * index : 6 * index + 6]
        drawn = sum(float(rect.attrib["width"]) for rect in row)
        assert drawn == pytest.approx((width - 64) * stage.memory_bytes / largest, abs=0.4)
    for element in root.iter():
        if "x" in element.attrib:
            assert 0 <= float(element.attrib["x"]) <= width
            assert 0 <= float(element.attrib["y"]) <= height
    words = " ".join(text.text or "" for text in root.iter(f"{SVG}text"))
    for stage in plan.stages:
        assert stage.machine in words
        assert stage.sysctl is None or stage.sysctl in words
    assert svg(plan) == svg(plan)


def test_the_founding_plans_promise_three_speeds_and_the_readme_shows_them() -> None:
    names = ("founding-q34-q6-4k", "founding-q34-q6", "founding-q34-q6-131k")
    plans = [golden(name).plan for name in names]
    assert [plan.workload.context for plan in plans] == list(SPEED_CONTEXTS) == [4_096, 40_960, 131_072]
    speeds = [plan.prediction.last_tokens_per_s for plan in plans]
    assert speeds[0] > speeds[1] > speeds[2]
    assert speeds[2] < 0.5 * speeds[0], "bytes alone would promise 0.8 of it"
    row = "| tokens/s | " + " | ".join(f"{speed:.1f}" for speed in speeds) + " |"
    root = Path(__file__).parents[3]
    assert row in (root / "shard_plans" / "README.md").read_text(encoding="utf-8")
    assert row in (root / "README.md").read_text(encoding="utf-8")


def test_speeds_at_both_ends_show_only_where_they_differ() -> None:
    plan = golden("founding-q34-q6").plan
    assert "at its end (40960 tokens)" in terminal(plan)
    assert "14.1 at its end" in svg(plan)
    same = replace(plan, prediction=replace(plan.prediction, last_tokens_per_s=plan.prediction.first_tokens_per_s))
    assert "at its end" not in terminal(same)


def test_a_limit_that_a_file_has_wrong_does_not_make_a_bar_without_end() -> None:
    assert (
        len(bar(stage_of(weight_bytes=1, limit_bytes=1 << 60, memory_bytes=1 << 30), largest_bytes=1 << 30))
        <= WIDTH + 5
    )
