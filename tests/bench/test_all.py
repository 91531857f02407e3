"""All benches in one run, with programs that stand in for them, and the page of what came of it."""

import json
import sys
import time
from html.parser import HTMLParser

import pytest

from exo_kimi.bench import all as everything
from exo_kimi.bench import plots, report
from exo_kimi.bench.frame import Result, Row
from exo_kimi.bench.outcome import BenchOutcome, missing, run_bench
from exo_kimi.bench.surroundings import Surroundings
from exo_kimi.cli.commands import BENCHES
from exo_kimi.errors import UsageError

GOOD = Result(
    bench="good",
    against="a peer 1.0",
    rows=[
        Row(name="L=1", ours=0.5, theirs=1.0, unit="s", ratio=2.0, bar=1.5, low=1.9, high=2.2, equal=True),
        Row(name="peak <b>", ours=10e6, theirs=40e6, unit="bytes", ratio=0.25, bar=0.3, direction="at most"),
        Row(name="shown", ours=3, unit="tokens/s", ratio=1.0, note="a note"),
    ],
    notes=["a line below"],
)
BAD = Result(bench="bad", rows=[Row(name="x", ours=1, theirs=1, unit="s", ratio=1.0, bar=2.0)])
HERE = Surroundings(
    cpu="chip",
    memory_gib=24,
    system="Linux",
    python="3.11",
    versions={"mlx": "0.32"},
    commit="abc+",
    taken="2026-01-01 00:00 UTC",
)


def ran(program: str, limit_s: float = 30.0) -> BenchOutcome:
    return run_bench("name", limit_s=limit_s, command=(sys.executable, "-c", program))


def printed(result: Result) -> BenchOutcome:
    return ran(f"print({result.table()!r}); print({result.json_line()!r})")


def test_rows_come_back_from_the_json_line_and_the_table_is_kept():
    outcome = printed(GOOD)
    assert outcome.rows == tuple(GOOD.rows)
    assert (outcome.ok, outcome.problem, outcome.against) == (True, None, "a peer 1.0")
    assert outcome.text == GOOD.table()
    assert outcome.worst is not None and outcome.worst.name == "peak <b>"


def test_what_is_skipped_passes_and_fails_nothing():
    outcome = printed(Result(bench="x", skipped="no peer"))
    assert (outcome.ok, outcome.skipped, outcome.summary()["ok"]) == (None, "no peer", None)


@pytest.mark.parametrize(
    "program",
    [
        "import sys; print('half a table'); print('it broke', file=sys.stderr); sys.exit(3)",
        "print('no JSON'); print('it broke')",
        "print('it broke'); print('{\"other\": 1}')",
    ],
)
def test_a_bench_without_a_result_is_a_failed_one_with_its_last_lines(program):
    outcome = ran(program)
    assert outcome.ok is False
    assert outcome.problem is not None and "it broke" in outcome.problem


def test_a_bench_that_hangs_is_stopped_with_all_that_it_started(tmp_path):
    seen = tmp_path / "alive"
    child = f"import time\\nwhile True: open({str(seen)!r}, 'a').write('x'); time.sleep(0.05)"
    outcome = ran(
        f'import subprocess, sys, time; subprocess.Popen([sys.executable, "-c", "{child}"]); time.sleep(60)', 1.5
    )
    assert outcome.problem is not None and outcome.problem.startswith("stopped after")
    time.sleep(0.2)
    size = seen.stat().st_size if seen.exists() else 0
    time.sleep(0.3)
    assert (seen.stat().st_size if seen.exists() else 0) == size


def test_all_prints_every_table_then_markdown_then_one_json_line(monkeypatch, capsys, tmp_path):
    outcomes = {"attention": printed(GOOD), "kv-b": printed(BAD), "router": missing("router", "not here")}
    monkeypatch.setattr(everything, "_run", lambda part: outcomes[part.name])
    html = tmp_path / "report.html"
    assert everything.main(["--only", "attention,kv_b, router", "--html", str(html)]) == 1
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    assert (document["bench"], document["ok"], document["ratio"], document["bar"]) == ("all", False, 1.0, 2.0)
    assert [part["ok"] for part in document["benches"]] == [True, False, None]
    assert out.index(GOOD.table()) < out.index(BAD.table()) < out.index("| bench | claim |")
    assert "router: skipped: not here" in out
    assert "**missed**" in out
    assert html.read_text().startswith("<!doctype html>")


def test_a_name_that_no_bench_has_and_a_file_that_cannot_be_written_are_told_first(tmp_path):
    with pytest.raises(UsageError, match="no such bench"):
        everything.main(["--only", "attention,nothing"])
    with pytest.raises(UsageError, match="cannot write"):
        everything.main(["--only", "attention", "--html", str(tmp_path / "none" / "x.html")])


def test_every_bench_of_the_command_line_is_run_or_left_out_with_a_reason():
    names = set(BENCHES)
    known = {part.name for part in everything.PARTS} | everything.LEFT_OUT.keys()
    assert names == known | {"all"}


class Balanced(HTMLParser):
    """Every tag that is opened is closed; nothing is fetched from elsewhere."""

    VOID = frozenset({"meta"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img")
        self.images += tag == "svg"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


OUTCOMES = [
    BenchOutcome(bench="good", seconds=1.0, against="a peer", rows=tuple(GOOD.rows), notes=("a line below",)),
    BenchOutcome(bench="bad", seconds=1.0, rows=tuple(BAD.rows)),
    missing("router", "not <here>"),
    BenchOutcome(bench="broken", seconds=1.0, problem="no result | Traceback <x>"),
]


def test_without_matplotlib_the_page_has_all_figures_and_says_what_plots_need(monkeypatch):
    monkeypatch.setattr(plots, "available", lambda: False)
    text = report.page(OUTCOMES, HERE)
    parser = Balanced()
    parser.feed(text)
    assert parser.open == [] and parser.images == 0
    assert "exo-kimi[report]" in text
    assert "2 of 3 bars met" in text
    for shown in ("abc+", "24 GiB", "500.00 ms", "peak &lt;b&gt;", "not &lt;here&gt;", "Traceback &lt;x&gt;", "a line"):
        assert shown in text


def test_the_plots_are_part_of_the_page_and_the_same_each_time():
    pytest.importorskip("matplotlib")
    text = report.page(OUTCOMES, HERE)
    parser = Balanced()
    parser.feed(text)
    assert parser.open == [] and parser.images == 3
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert text == report.page(OUTCOMES, HERE)


def test_the_surroundings_are_this_machine():
    facts = Surroundings.here().facts()
    assert facts["processor"] and facts["memory"].endswith("GiB")
    assert "mlx-lm" in facts["versions"]
