"""A node notices a runner that is frozen, and ends nobody else."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from exo_kimi.plugin.runner import beats
from exo_kimi.plugin.runner.beats import FOLDER, FROZEN_S, RunnerBeat, RunnerReport, RunnerWatch

LOOKS = int(FROZEN_S / beats._WATCH_S) + 1


@dataclass
class Node:
    """A node with one runner."""

    folder: Path
    alive: frozenset[int] = frozenset({7})
    killed: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.beat = RunnerBeat(
            RunnerReport(pid=7, instance_id="i", model_id="m", rank=0, engine="exo-kimi"), self.folder
        )
        self.watch = RunnerWatch(self.folder, children=lambda: self.alive, kill=self.killed.append)

    def looks(self, count: int) -> None:
        for _ in range(count):
            self.watch.look()


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_a_runner_that_stops_beating_is_ended_and_told_as_frozen_before(node: Node) -> None:
    node.beat.beat()
    node.looks(LOOKS // 2)
    (report,) = node.watch.reports()
    assert report.waits_for == "its process is frozen" and not node.killed
    node.looks(LOOKS)
    assert node.killed == [7]


def test_a_runner_that_beats_again_in_time_begins_anew(node: Node) -> None:
    for _ in range(5):
        node.beat.beat()
        node.looks(LOOKS - 5)
    assert not node.killed


def test_a_runner_that_has_not_begun_to_beat_is_let_alone(node: Node) -> None:
    """It loads, or it runs exo's engine."""
    node.looks(3 * LOOKS)
    assert not node.killed and node.watch.reports()[0].waits_for is None


def test_a_dead_runner_is_forgotten(node: Node) -> None:
    node.beat.beat()
    node.alive = frozenset()
    node.looks(LOOKS)
    assert not node.killed and node.watch.reports() == () and not list(node.folder.iterdir())


def test_without_a_folder_nothing_is_written_and_nothing_breaks(node: Node, tmp_path: Path) -> None:
    RunnerBeat.of_this_runner(RunnerReport(pid=8, instance_id="i", model_id="m", rank=0, engine="exo"), {}).beat()
    assert [path.name for path in tmp_path.iterdir()] == ["7"]
    (tmp_path / "7").unlink()
    tmp_path.rmdir()
    node.beat.beat()
    node.looks(1)
    assert node.watch.reports() == ()


def _beat_for_ever() -> None:
    report = RunnerReport(pid=os.getpid(), instance_id="i", model_id="m", rank=0, engine="exo-kimi")
    RunnerBeat.of_this_runner(report, os.environ).start()
    time.sleep(60)


def test_a_frozen_process_is_killed_and_another_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beats, "FROZEN_S", 1.5)
    monkeypatch.setattr(beats, "BEAT_S", 0.2)  # in the children too, which are forked
    monkeypatch.setenv(FOLDER, "")
    watch = RunnerWatch()
    watch.begin(os.environ)
    fork = multiprocessing.get_context("fork")
    frozen, well = (fork.Process(target=_beat_for_ever, daemon=True) for _ in range(2))
    try:
        for process in (frozen, well):
            process.start()
        assert frozen.pid is not None
        time.sleep(0.5)
        os.kill(frozen.pid, signal.SIGSTOP)
        until_s = time.monotonic() + 20
        while frozen.is_alive() and time.monotonic() < until_s:
            watch.look()
            time.sleep(beats._WATCH_S)
        assert frozen.exitcode == -signal.SIGKILL
        assert well.is_alive()
    finally:
        for process in (frozen, well):
            process.kill()
            process.join()
