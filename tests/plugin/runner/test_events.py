"""What a runner tells exo while it does not hear the others, and when it ends."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from exo_kimi.errors import StageError
from exo_kimi.plugin.runner import events
from exo_kimi.plugin.runner.beats import RunnerBeat, RunnerReport, RunnerWatch
from exo_kimi.plugin.runner.events import EventTypes, TruthfulSender


class RunnerStatusUpdated(SimpleNamespace):
    """As exo's."""


class RunnerReady(SimpleNamespace):
    """As exo's."""


class RunnerRunning(SimpleNamespace):
    """As exo's."""


class RunnerLoading(SimpleNamespace):
    """As exo's."""


class RunnerWarmingUp(SimpleNamespace):
    """As exo's."""


class Other(SimpleNamespace):
    """Any other event."""


class Pipe:
    """exo's sender."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.did: list[str] = []

    def send(self, event: Any) -> None:
        self.sent.append(event)

    def close(self) -> None:
        self.did.append("close")

    def join(self) -> None:
        self.did.append("join")

    @property
    def statuses(self) -> list[str]:
        return [type(each.runner_status).__name__ for each in self.sent if isinstance(each, RunnerStatusUpdated)]


class Runner:
    """A sender around a pipe, and where its node looks."""

    def __init__(self, folder: Path, *, termination: Any = lambda error: f"ended: {error.what}") -> None:
        self.pipe, self.left = Pipe(), []  # type: ignore[var-annotated]
        report = RunnerReport(pid=7, instance_id="i", model_id="m", rank=1, engine="exo-kimi")
        self.watch = RunnerWatch(folder, children=lambda: frozenset({7}))
        self.sender = TruthfulSender(
            self.pipe,
            "m",
            types=EventTypes(
                RunnerWarmingUp=RunnerWarmingUp, ChunkGenerated=Other, ErrorChunk=Other, termination=termination
            ),
            beat=RunnerBeat(report, folder),
            leave=self.left.append,
        )

    def say(self, status: Any) -> None:
        self.sender.send(RunnerStatusUpdated(runner_id="r", runner_status=status))


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


def test_ready_is_not_said_while_a_rank_is_missing_and_is_said_again_afterwards(runner: Runner) -> None:
    runner.say(RunnerReady())
    runner.sender.hold("rank 1 is silent")
    runner.sender.hold("rank 1 is still silent")
    runner.say(RunnerRunning())
    runner.say(RunnerReady())
    runner.sender.release()
    runner.sender.release()
    warming = "RunnerWarmingUp"
    assert runner.pipe.statuses == ["RunnerReady", warming, warming, warming, "RunnerReady"]
    assert {each.runner_id for each in runner.pipe.sent} == {"r"}


def test_other_statuses_and_events_pass_as_they_are(runner: Runner) -> None:
    runner.sender.hold("rank 1 is silent")
    runner.say(RunnerLoading())
    runner.sender.send(chunk := Other())
    runner.sender.release()
    runner.sender.close()
    runner.sender.join()
    assert runner.pipe.statuses == ["RunnerLoading"] and runner.pipe.sent[1] is chunk
    assert runner.pipe.did == ["close", "join"]


def test_the_node_can_say_what_a_runner_waits_for(runner: Runner) -> None:
    runner.sender.hold("rank 0 is silent")
    assert [each.waits_for for each in runner.watch.reports()] == ["rank 0 is silent"]
    runner.sender.release()
    assert [each.waits_for for each in runner.watch.reports()] == [None]


def test_an_ending_runner_tells_those_who_wait_and_exo_why(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_FLUSH_S", 0.0)
    runner.sender.end(StageError("rank 1 is gone"), ["c1", "c2"])
    *chunks, ended = runner.pipe.sent
    assert [(each.command_id, each.chunk.error_message) for each in chunks] == [
        (command_id, "exo-kimi (503 engine_unavailable): rank 1 is gone") for command_id in ("c1", "c2")
    ]
    assert ended == "ended: rank 1 is gone" and runner.left == [1]


def test_an_exo_that_takes_no_reason_gets_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_FLUSH_S", 0.0)
    runner = Runner(tmp_path, termination=None)
    runner.sender.end(StageError("rank 1 is gone"), [])
    assert runner.pipe.sent == [] and runner.left == [1]
