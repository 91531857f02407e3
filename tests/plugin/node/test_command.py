"""`apply --keep` and `exo run --keep` as the command line calls them."""

from __future__ import annotations

import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from exo_kimi import cli
from exo_kimi.errors import PlanError, UsageError
from exo_kimi.plugin.control.watch import Deadlines
from exo_kimi.plugin.node import command as node_command
from exo_kimi.plugin.node.keeper import Patience
from exo_kimi.plugin.node.record import KeepRecord
from exo_kimi.plugin.runner import launch
from exo_kimi.plugin.runner.options import EngineOptions

MODEL = "lab/kimi-k2-tiny"


@pytest.fixture
def exo(make_exo: Any, client_of: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A fake exo behind every address, that is looked at without waiting."""
    made = make_exo()
    monkeypatch.setattr(node_command, "ExoClient", lambda url: client_of(made))
    monkeypatch.setattr(node_command, "Deadlines", partial(Deadlines, poll_s=0.001))
    return made


@pytest.fixture
def plan(exo: Any, plan_of: Any, tmp_path: Path) -> Path:
    path = tmp_path / "PLAN.json"
    plan_of(exo).save(path)
    return path


class Stop(Exception):
    """Ends a command that stays."""


def stopping(told: list[str], word: str) -> Any:
    def echo(line: str) -> None:
        told.append(line)
        if word in line:
            raise Stop

    return echo


def test_apply_keep_places_at_once_and_stays(exo: Any, plan: Path, tmp_path: Path) -> None:
    record = tmp_path / "kept.json"
    KeepRecord(record).set_resting(MODEL, True)  # a person ended it yesterday, and asks for it now
    told: list[str] = []
    with pytest.raises(Stop):
        node_command.keep("http://any", plan, record=record, echo=stopping(told, "answers,"))
    assert len(exo.instances) == 1 and next(iter(exo.instances)).startswith("kept-")
    assert told[0].startswith("keeping lab/kimi-k2-tiny placed; Ctrl-C")
    assert not KeepRecord(record).rests(MODEL)


def test_what_cannot_be_kept_is_one_clear_message(plan: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--keep keeps a plan's split"):
        node_command.keep("http://any", plan, tensor=True)
    with pytest.raises(UsageError, match="moon is no machine of a plan"):
        node_command.kept_plans([plan], nodes=["moon=studio"])
    with pytest.raises(PlanError):
        node_command.kept_plans([tmp_path / "none.json"])


@pytest.mark.parametrize("command", [["exo", "apply", "PLAN"], ["exo", "run"]])
def test_a_fallback_alone_is_refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command, "--fallback", "SMALL"]) != 0
    assert "--fallback is for --keep" in capsys.readouterr().err


def test_where_a_nodes_api_will_be_follows_from_exos_arguments() -> None:
    assert node_command._url_of([]) == "http://127.0.0.1:52415"
    assert node_command._url_of(["-v", "--api-port", "9", "--offline"]) == "http://127.0.0.1:9"
    with pytest.raises(UsageError, match="--no-api leaves it out"):
        node_command._url_of(["--no-api"])
    with pytest.raises(UsageError, match="cannot read exo's arguments"):
        node_command._url_of(["--api-port", "many"])


@pytest.mark.parametrize("no_plan", [False, True])
def test_run_binds_the_planner_unless_told_not_to_and_keeps(
    no_plan: bool, plan: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done: list[Any] = []
    placement = "exo_kimi.plugin.node.placement.bind_planner"
    monkeypatch.setattr(placement, lambda plans, say: done.append(("planner", plans[0].model_id)))
    monkeypatch.setattr(node_command, "keep_beside", lambda url, plans: done.append((url, plans[0].model_id)))
    monkeypatch.setattr(node_command, "default_record", lambda model_id: tmp_path / "kept.json")
    monkeypatch.setattr(launch, "run", lambda rest, *, options, say, begin: begin(True))
    node_command.run(["--api-port", "7"], options=EngineOptions(), kept=[plan], no_plan=no_plan, say=lambda line: None)
    planner = [] if no_plan else [("planner", MODEL)]
    assert done == [*planner, ("http://127.0.0.1:7", MODEL)]


def test_a_node_keeps_from_a_thread_and_says_so_in_exos_log(
    exo: Any, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    loguru = ModuleType("loguru")
    vars(loguru)["logger"] = SimpleNamespace(info=logged.append)
    monkeypatch.setitem(sys.modules, "loguru", loguru)
    patience = Patience(poll_s=0.01, settle_s=0.0, turn_s=0.0)
    monkeypatch.setattr("exo_kimi.plugin.node.keeper.Deadlines", partial(Deadlines, poll_s=0.001))
    over = threading.Event()
    thread = node_command.keep_beside(
        "http://any",
        node_command.kept_plans([plan]),
        record=tmp_path / "kept.json",
        patience=patience,
        until=over.is_set,
    )
    end = time.monotonic() + 20
    while not any("answers," in line for line in logged):
        assert time.monotonic() < end, logged
        time.sleep(0.02)
    over.set()
    thread.join(10)
    assert not thread.is_alive()
    assert logged[0].startswith("exo-kimi: placing lab/kimi-k2-tiny on mini and studio")
