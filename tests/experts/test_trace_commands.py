"""`exo-kimi trace make` and `replay`: a table, one JSON line, hit rates that the planner reads, and a plot."""

from __future__ import annotations

import json
import xml.etree.ElementTree
from pathlib import Path

import pytest

from exo_kimi.cli.app import run
from exo_kimi.errors import UsageError
from exo_kimi.experts.traces.report import EVERY_POLICY, ReplayTable
from exo_kimi.experts.traces.synthetic import uniform
from exo_kimi.planner.streaming import read_curve


def test_a_made_trace_is_replayed_and_planned_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, hits, plot = (str(tmp_path / name) for name in ("t.npz", "hits.toml", "plot.svg"))
    run(["trace", "make", trace, "--kind", "zipf", "--experts", "32", "--chosen", "4", "--tokens", "300"])
    run(["trace", "replay", trace, "--slots", "8,16,32", "-o", hits, "--svg", plot])
    table, line = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    assert all(name in table for name in (*EVERY_POLICY, "che", "zipf 1: 300 tokens"))
    counted = json.loads(line)["policies"]
    assert [each["slots"] for each in counted["lru"]] == [8, 16, 32]
    curve = read_curve(hits)
    lru = counted["lru"][0]
    assert curve.measured and curve.at(8 / 32) == pytest.approx(lru["hits"] / (lru["hits"] + lru["misses"]), abs=1e-4)
    assert curve.at(8 / 32, "slow") <= curve.at(8 / 32) <= curve.at(8 / 32, "fast")
    lines = xml.etree.ElementTree.parse(plot).getroot().findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == len(EVERY_POLICY)


def test_a_scan_costs_the_plan_every_read(tmp_path: Path) -> None:
    """Measured rates may be below chance, and are taken as they are."""
    trace, hits = str(tmp_path / "t.npz"), str(tmp_path / "hits.toml")
    run(["trace", "make", trace, "--kind", "scan", "--experts", "64", "--tokens", "100"])
    run(["trace", "replay", trace, "--policy", "lru", "--slots", "32", "-o", hits])
    assert read_curve(hits).at(0.5) == 0.0


def test_the_same_table_is_drawn_the_same(tmp_path: Path) -> None:
    table = ReplayTable.of(uniform(experts=16, chosen=2, tokens=50), policies=("lru",))
    assert table.svg() == table.svg()
    assert table.slots == (2, 3, 4, 6, 8, 12, 16)


def test_mistakes_are_named(tmp_path: Path) -> None:
    trace = str(tmp_path / "t.npz")
    run(["trace", "make", trace, "--experts", "16", "--chosen", "2", "--tokens", "20"])
    for words, message in (
        (["--slots", "17"], "more slots than experts"),
        (["--policy", "fifo"], "no such policy"),
        (["--slots", "0"], "at least 1"),
    ):
        with pytest.raises(UsageError, match=message):
            run(["trace", "replay", trace, *words])
    with pytest.raises(UsageError, match="cannot be made"):
        run(["trace", "make", trace, "--experts", "4", "--chosen", "8"])
