"""The shared part of the benchmarks: order of runs, medians, bars, the JSON line."""

import argparse
import json

import pytest

from exo_kimi.bench.frame import Result, Row, finish, quartiles, taken_in_turn


def test_runs_alternate_and_the_first_pairs_do_not_count():
    calls: list[str] = []

    def run(name: str) -> int:
        calls.append(name)
        return len(calls)

    pairs = taken_in_turn(lambda: run("ours"), lambda: run("theirs"), rounds=2, warm=1)
    assert calls == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert pairs == [(4, 3), (5, 6)]


def test_the_ratio_is_the_median_of_ratios_and_not_a_ratio_of_medians():
    row = Row.of_pairs("x", [(1.0, 2.0), (10.0, 30.0), (2.0, 8.0)], unit="s", bar=3.0)
    assert (row.ratio, row.ours, row.theirs) == (3.0, 2.0, 8.0)
    assert row.ok
    assert Row.of_pairs("x", [(1.0, 2.0)], unit="s", inverse=True).ratio == 0.5


@pytest.mark.parametrize(("direction", "ratio", "ok"), [("at least", 0.9, False), ("at most", 0.9, True)])
def test_a_bar_has_a_direction(direction, ratio, ok):
    assert Row(name="x", ours=1, unit="s", ratio=ratio, bar=1.0, direction=direction).ok is ok


def test_a_row_whose_outputs_differ_never_passes():
    assert not Row(name="x", ours=1, unit="s", ratio=99, bar=1.0, equal=False).ok


def test_the_json_line_tells_the_row_with_the_least_margin(capsys):
    rows = [Row(name="near", ours=1, unit="s", ratio=1.1, bar=1.0), Row(name="far", ours=1, unit="s", ratio=9, bar=2)]
    status = finish(Result(bench="b", against="peer 1.0", rows=rows, notes=["a note"]))
    table, line = capsys.readouterr().out.rsplit("\n", 2)[:2]
    document = json.loads(line)
    assert status == 0
    assert {key: document[key] for key in ("bench", "ratio", "bar", "ok", "worst")} == {
        "bench": "b",
        "ratio": 1.1,
        "bar": 1.0,
        "ok": True,
        "worst": "near",
    }
    assert "near" in table
    assert "a note" in table


def test_a_missed_bar_is_an_exit_status_and_a_skip_is_not(capsys):
    missed = Row(name="x", ours=1, unit="s", ratio=0.5, bar=1.0)
    assert finish(Result(bench="b", rows=[missed])) == 1
    assert "MISSED" in capsys.readouterr().out
    assert finish(Result(bench="b", skipped="no peer")) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["skipped"] == "no peer"


def test_quartiles_of_one_value_are_that_value():
    assert quartiles([2.0]) == (2.0, 2.0, 2.0)


def test_table_json_line_and_each_row_name_the_command_with_every_option(capsys):
    options = argparse.Namespace(heads=64, lengths=[1, 2], drop_caches=True, quick=False, html=None)
    finish(Result(bench="b", rows=[Row(name="x", ours=1, unit="s", ratio=1.0)]), options)
    table, line = capsys.readouterr().out.rsplit("\n", 2)[:2]
    command = "exo-kimi bench b --heads 64 --lengths 1,2 --drop-caches"
    assert table.splitlines()[-1] == command
    document = json.loads(line)
    assert [document["command"], document["rows"][0]["command"]] == [command, command]
