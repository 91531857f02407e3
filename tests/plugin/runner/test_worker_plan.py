"""The worker's plan around exo's: forgotten cancels, runners that do not end, failures that are long past."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from exo_kimi.plugin.runner.worker_plan import LEAVING_S, STEADY_S, WorkerPlan


class TextGeneration(SimpleNamespace):
    """As exo's."""


class CancelTask(SimpleNamespace):
    """As exo's."""


class Shutdown(SimpleNamespace):
    """As exo's."""


class CreateRunner(SimpleNamespace):
    """As exo's."""


class RunnerReady(SimpleNamespace):
    """As exo's."""


class RunnerFailed(SimpleNamespace):
    """As exo's."""


class RunnerLoading(SimpleNamespace):
    """As exo's."""


@dataclass
class Backoff:
    """exo's count of starts."""

    counted: dict[str, int] = field(default_factory=dict)

    def attempts(self, key: str) -> int:
        return self.counted.get(key, 0)

    def reset(self, key: str) -> None:
        self.counted.pop(key, None)


@dataclass
class Worker:
    """What a worker hands its plan, with a clock and a process that lives until it is killed."""

    planned: Any = None
    now_s: float = 0.0
    alive: bool = True
    statuses: dict[str, Any] = field(default_factory=dict)
    backoff: Backoff = field(default_factory=Backoff)
    tasks: dict[str, Any] = field(default_factory=dict)
    killed: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        instance = SimpleNamespace(
            instance_id="i", shard_assignments=SimpleNamespace(runner_to_shard={"r0": None, "r1": None})
        )
        self.runner = SimpleNamespace(
            in_progress={},
            cancelled=set(),
            bound_instance=SimpleNamespace(instance=instance),
            runner_process=SimpleNamespace(pid=77, is_alive=lambda: self.alive),
        )
        self.runners = {"r0": self.runner}
        self.begun = 0
        self.seen: list[Any] = []
        self.plan = WorkerPlan(self.exos_plan, begin=self.begin, clock=lambda: self.now_s, kill=self.kill)

    def create(self, runner_id: str) -> CreateRunner:
        bound = SimpleNamespace(bound_runner_id=runner_id, instance=self.runner.bound_instance.instance)
        return CreateRunner(bound_instance=bound)

    def exos_plan(self, *arguments: Any) -> Any:
        self.seen.append(arguments[4])
        return self.planned

    def begin(self) -> None:
        self.begun += 1

    def kill(self, pid: int) -> None:
        self.killed.append(pid)
        self.alive = False

    def look(self, planned: Any = None) -> Any:
        self.planned = planned
        return self.plan("node", self.runners, {}, {}, self.statuses, self.tasks, {}, {}, self.backoff, None)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    module = ModuleType("exo.shared.types.tasks")
    vars(module)["CancelTask"] = CancelTask
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield Worker()


def test_what_exo_plans_goes_first_and_the_watch_begins_with_the_first_look(worker: Worker) -> None:
    worker.runner.in_progress["t"] = TextGeneration(task_id="t", instance_id="i")
    assert worker.begun == 0
    assert worker.look("exo's") == worker.look("exo's") == "exo's"
    assert worker.begun == 1


def test_a_task_that_was_deleted_while_a_runner_works_on_it_is_cancelled(worker: Worker) -> None:
    worker.runner.in_progress |= {"t": TextGeneration(task_id="t", instance_id="i"), "load": SimpleNamespace()}
    assert vars(worker.look()) == {"instance_id": "i", "cancelled_task_id": "t", "runner_id": "r0"}


@pytest.mark.parametrize("change", [lambda w: w.tasks.update(t=object()), lambda w: w.runner.cancelled.add("t")])
def test_a_task_that_exo_still_knows_or_has_cancelled_is_let_alone(
    worker: Worker, change: Callable[[Worker], None]
) -> None:
    worker.runner.in_progress["t"] = TextGeneration(task_id="t", instance_id="i")
    change(worker)
    assert worker.look() is None


def test_no_runner_is_made_while_the_one_before_lives_and_one_that_does_not_end_is_killed(worker: Worker) -> None:
    create = worker.create("r0")
    worker.look(Shutdown(runner_id="r0"))
    worker.runners.clear()
    assert worker.look(create) is None
    worker.now_s = LEAVING_S - 1
    assert worker.look(create) is None and not worker.killed
    worker.now_s = LEAVING_S + 1
    assert worker.look(create) is None and worker.killed == [77]
    assert worker.look(create) is create


def test_a_runner_that_ended_and_one_of_another_instance_are_replaced_at_once(worker: Worker) -> None:
    worker.look(Shutdown(runner_id="r0"))
    worker.runners.clear()
    other = worker.create("r9")
    assert worker.look(other) is other
    worker.alive = False
    again = worker.create("r0")
    assert worker.look(again) is again and not worker.killed


def test_starts_are_counted_anew_once_an_instance_has_served_for_a_while(worker: Worker) -> None:
    worker.backoff.counted["i"] = 4
    worker.statuses = {"r0": RunnerReady(), "r1": RunnerReady()}
    worker.look()
    worker.now_s = STEADY_S - 1
    worker.look()
    assert worker.backoff.counted == {"i": 4}
    worker.now_s = STEADY_S + 1
    worker.look()
    assert worker.backoff.counted == {}


def test_an_instance_that_fails_again_and_again_is_still_counted(worker: Worker) -> None:
    worker.backoff.counted["i"] = 4
    for second in range(0, int(4 * STEADY_S), 20):
        worker.now_s = second
        worker.statuses = {"r0": RunnerReady(), "r1": RunnerReady() if second % 40 else RunnerLoading()}
        worker.look()
    assert worker.backoff.counted == {"i": 4}


def test_a_new_runner_is_not_ended_for_another_ranks_old_failure_and_is_for_a_new_one(worker: Worker) -> None:
    old = RunnerFailed()
    worker.statuses = {"r0": RunnerFailed(), "r1": old}
    held, worker.runners = worker.runners, {}
    worker.look(worker.create("r0"))
    worker.runners = held
    worker.look()
    assert "r1" not in worker.seen[-1]
    worker.statuses = {"r0": RunnerLoading(), "r1": old, "r2": old}
    worker.look()
    assert worker.seen[-1] == {"r0": worker.statuses["r0"], "r2": old}
    worker.statuses = {"r0": RunnerLoading(), "r1": RunnerFailed()}
    worker.look()
    assert worker.seen[-1] == worker.statuses
    worker.runners, worker.statuses = {}, {"r1": old}
    worker.look()
    assert worker.seen[-1] == {"r1": old}
