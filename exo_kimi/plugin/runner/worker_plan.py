"""What a node's worker does next: exo's own plan, and what it leaves out on days when runners freeze and replies are cancelled.

exo looks ten times a second. Its plan is a function of what the worker knows; ours calls it, and only ever adds a task, or waits
with one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

logger = logging.getLogger(__name__)
LEAVING_S = 10.0  # exo asks a runner to end, then sends signals that a frozen one does not take, for half a minute
STEADY_S = 60.0  # a runner that was ready for so long has not failed to start
_SERVING = ("RunnerReady", "RunnerRunning")


class WorkerPlan:
    """The plan of one node's worker.

    Args:
        plan: exo's.
        begin: called once, when the worker first asks: in the process that works, whatever exo has forked before.
        clock: seconds.
        kill: ends a process.
    """

    def __init__(
        self,
        plan: Callable[..., Any],
        *,
        begin: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        kill: Callable[[int], None] = lambda pid: os.kill(pid, signal.SIGKILL),
    ) -> None:
        functools.update_wrapper(self, plan)
        self._plan = plan
        self._begin: Callable[[], None] | None = begin
        self._clock = clock
        self._kill = kill
        self._leaving: dict[Any, tuple[Any, float]] = {}
        self._serving_since: dict[Any, float] = {}
        self._known_failures: dict[Any, dict[Any, Any]] = {}  # of other ranks, when a runner of this node was made

    def __call__(
        self,
        node_id: Any,
        runners: Mapping[Any, Any],
        global_download_status: Any,
        instances: Any,
        all_runners: Mapping[Any, Any],
        tasks: Mapping[Any, Any],
        input_chunk_buffer: Any,
        image_cache: Any,
        instance_backoff: Any,
        download_backoff: Any,
    ) -> Any:
        """The next task, or None."""
        if self._begin is not None:
            self._begin()
            self._begin = None
        self._forgive_old_failures(runners, all_runners, instance_backoff)
        planned = self._plan(
            node_id,
            runners,
            global_download_status,
            instances,
            self._without_old_news(runners, all_runners),
            tasks,
            input_chunk_buffer,
            image_cache,
            instance_backoff,
            download_backoff,
        )
        self._end_those_that_stay()
        match type(planned).__name__:
            case "Shutdown" if planned.runner_id in runners:
                self._leaving[planned.runner_id] = (runners[planned.runner_id].runner_process, self._clock())
            case "CreateRunner" if planned.bound_instance.bound_runner_id in self._leaving:
                return None  # the one before still has the memory and the port
            case "CreateRunner":
                bound = planned.bound_instance
                self._known_failures[bound.bound_runner_id] = {
                    rank: status
                    for rank in bound.instance.shard_assignments.runner_to_shard
                    if type(status := all_runners.get(rank)).__name__ == "RunnerFailed"
                }
        return planned if planned is not None else _forgotten_cancel(runners, tasks)

    def _without_old_news(self, runners: Mapping[Any, Any], all_runners: Mapping[Any, Any]) -> Mapping[Any, Any]:
        """What exo knows of all runners, without failures that a runner of this node was made after.

        exo ends a runner while another rank's last word is that it failed. When two ranks have failed, each ends its new runner
        for the other's old failure, five times in half a minute, and then deletes the instance.
        """
        self._known_failures = {each: known for each, known in self._known_failures.items() if each in runners}
        old = {rank: status for known in self._known_failures.values() for rank, status in known.items()}
        return (
            {rank: status for rank, status in all_runners.items() if old.get(rank) is not status}
            if old
            else all_runners
        )

    def _end_those_that_stay(self) -> None:
        for runner_id, (process, since_s) in tuple(self._leaving.items()):
            if not _is_alive(process):
                del self._leaving[runner_id]
            elif self._clock() - since_s > LEAVING_S:
                logger.warning("a runner did not end within %g s: it is killed", LEAVING_S)
                with contextlib.suppress(ProcessLookupError):
                    self._kill(process.pid)

    def _forgive_old_failures(self, runners: Mapping[Any, Any], all_runners: Mapping[Any, Any], backoff: Any) -> None:
        """exo counts the starts of an instance for as long as it exists, and deletes it at the sixth: five bad moments in
        months. What has served for a while has started well, so it counts anew."""
        now_s = self._clock()
        serving = set()
        for runner in runners.values():
            instance = runner.bound_instance.instance
            ranks = instance.shard_assignments.runner_to_shard
            if all(type(all_runners.get(rank)).__name__ in _SERVING for rank in ranks):
                serving.add(instance.instance_id)
        self._serving_since = {each: self._serving_since.get(each, now_s) for each in serving}
        for instance_id, since_s in self._serving_since.items():
            if now_s - since_s > STEADY_S and backoff.attempts(instance_id):
                backoff.reset(instance_id)


def _is_alive(process: Any) -> bool:
    try:
        return bool(process.is_alive())
    except ValueError:  # closed, so it has ended
        return False


def _forgotten_cancel(runners: Mapping[Any, Any], tasks: Mapping[Any, Any]) -> Any:
    """exo's API cancels a task and deletes it in one go, so the plan mostly never sees it, and a reply that nobody reads is
    generated to its end. What a runner still works on although it is deleted is cancelled here."""
    for runner_id, runner in runners.items():
        for task_id, task in runner.in_progress.items():
            if type(task).__name__ == "TextGeneration" and task_id not in tasks and task_id not in runner.cancelled:
                tasks_module = importlib.import_module("exo.shared.types.tasks")
                return tasks_module.CancelTask(
                    instance_id=task.instance_id, cancelled_task_id=task_id, runner_id=runner_id
                )
    return None
