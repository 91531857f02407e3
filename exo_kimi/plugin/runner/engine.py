"""exo's Engine on our runtime: our scheduler on rank 0, our stages on all ranks.

It fits exo's abstract class by its methods (`launch` registers it there), so nothing of exo is imported here. exo gives
every task to every rank; chunks come from rank 0, and the others say that a task ended when rank 0 says so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from queue import Empty
from typing import Any, Protocol

from exo_kimi.errors import ExoError, StageDiedError
from exo_kimi.plugin.runner.advice import advise, advising
from exo_kimi.plugin.runner.chunks import ExoTypes
from exo_kimi.plugin.runner.events import RunnerEvents
from exo_kimi.plugin.runner.judge import HOPELESS_S, TICK_S, Judge
from exo_kimi.plugin.runner.leader import ENDED, READY_S, Leader
from exo_kimi.plugin.runner.rank_messages import SILENCE_S, RankMessagesReader
from exo_kimi.plugin.runner.stage import StageHost

_WAIT_S = 0.02  # a step that has nothing to tell gives exo's runner a chance to take the next task
_REMEMBERED = 256


class CancelReceiver(Protocol):
    """exo's end of the pipe with cancelled tasks."""

    def collect(self) -> list[Any]:
        """What arrived."""
        ...


class KimiEngine:
    """What both kinds of ranks have in common of exo's Engine."""

    def __init__(self, host: StageHost, *, types: ExoTypes, cancelled: CancelReceiver) -> None:
        self._host = host
        self._types = types
        self._cancel_receiver = cancelled
        self._cancelled_tasks: dict[str, None] = {}  # by exo's name; also of tasks that are still to come
        self._active: dict[str, Any] = {}  # exo's tasks

    def should_cancel(self, task_id: Any) -> bool:
        """Whether exo wants this task to end."""
        self._collect()
        return str(task_id) in self._cancelled_tasks

    def serve_prefill(self, request: Any, wfile: Any) -> None:
        """exo's prefill for another instance.

        Raises:
            ExoError: always; exo then lets that instance do its own prefill.
        """
        raise ExoError("this engine does not prefill for other instances", where=getattr(request, "request_id", None))

    def _collect(self) -> None:
        for task_id in map(str, self._cancel_receiver.collect()):
            everything = task_id == self._types.cancel_all
            for each in self._active if everything else (task_id,):
                self._cancelled_tasks[each] = None
        while len(self._cancelled_tasks) > _REMEMBERED:
            del self._cancelled_tasks[next(iter(self._cancelled_tasks))]

    def _take_cancelled(self) -> list[str]:
        """Tasks of ours that were cancelled; they are active no more."""
        self._collect()
        found = [task_id for task_id in self._active if task_id in self._cancelled_tasks]
        for task_id in found:
            del self._active[task_id], self._cancelled_tasks[task_id]
        return found


class Leading(KimiEngine):
    """Rank 0's engine.

    Args:
        leader: runs the replies.
        host: this rank's stage.
        warm_up: brings the stages together.
        types: exo's.
        cancelled: exo's pipe.
    """

    def __init__(
        self,
        leader: Leader,
        host: StageHost,
        warm_up: Callable[[], None],
        *,
        types: ExoTypes,
        cancelled: CancelReceiver,
    ) -> None:
        super().__init__(host, types=types, cancelled=cancelled)
        self._leader = leader
        self._warm_up = warm_up

    def warmup(self) -> None:
        """Bring the stages together; every other rank has loaded and waits in its own warm-up."""
        with advising():
            self._warm_up()

    def submit(self, task: Any) -> None:
        """Begin a task."""
        task_id = str(task.task_id)
        self._active[task_id] = task
        self._leader.submit(task_id, task)

    def step(self) -> Iterable[tuple[Any, Any]]:
        """What came since the last step, after waiting a little for something."""
        results: list[tuple[Any, Any]] = []
        known = dict(self._active)
        for task_id in self._take_cancelled():
            self._leader.cancel(task_id)
            results.append((known[task_id].task_id, self._types.CancelledResponse()))
        timeout_s = 0.0 if results else _WAIT_S
        while True:
            try:
                task_id, output = self._leader.outputs.get(timeout=timeout_s) if timeout_s else self._next()
            except Empty:
                break
            timeout_s = 0.0
            if task_id not in self._active:
                continue  # cancelled; exo's runner has forgotten it
            if output is ENDED:
                results.append((self._active.pop(task_id).task_id, self._types.FinishedResponse()))
            else:
                results.append((self._active[task_id].task_id, output))
        return results

    def close(self) -> None:
        """Stop; exo ends the process soon."""
        self._leader.close()
        self._host.stop()

    def _next(self) -> tuple[str, Any]:
        return self._leader.outputs.get_nowait()


class Follower(KimiEngine):
    """Another rank's engine: its stage works by itself, this only follows which tasks are over.

    Args:
        reader: hears rank 0.
        host: this rank's stage.
        types: exo's.
        events: takes how rank 0 is.
        cancelled: exo's pipe.
    """

    def __init__(
        self,
        reader: RankMessagesReader,
        host: StageHost,
        *,
        types: ExoTypes,
        events: RunnerEvents,
        cancelled: CancelReceiver,
    ) -> None:
        super().__init__(host, types=types, cancelled=cancelled)
        self._reader = reader
        self._events = events
        self._closed = threading.Event()

    def warmup(self) -> None:
        """Wait for rank 0, which exo warms up last."""
        with advising():
            self._reader.wait_ready(READY_S)
        threading.Thread(target=self._judge, name="exo-kimi-judge", daemon=True).start()

    def submit(self, task: Any) -> None:
        """Take note of a task."""
        self._active[str(task.task_id)] = task

    def step(self) -> Iterable[tuple[Any, Any]]:
        """Tasks that are over, after waiting a little for one."""
        known = dict(self._active)
        cancelled = self._take_cancelled()
        if cancelled:
            return [(known[task_id].task_id, self._types.CancelledResponse()) for task_id in cancelled]
        done = self._reader.take_done(self._active, _WAIT_S)
        return [(self._active.pop(task_id).task_id, self._types.FinishedResponse()) for task_id in done]

    def close(self) -> None:
        """Stop; exo ends the process soon."""
        self._closed.set()
        self._reader.close()
        self._host.stop()

    def _judge(self) -> None:
        """Whether rank 0 is there, with and without tasks; if it is gone for good, this runner ends."""
        judge = Judge()
        while not self._closed.wait(TICK_S):
            lost, silent_s = self._reader.lost, self._reader.silent_s
            match judge.tick(connected=lost is None and silent_s < SILENCE_S, silent_s=silent_s):
                case "together":
                    self._events.release()
                case "apart":
                    self._events.hold(f"rank 0 ({self._reader.leader}) is silent for {silent_s:.0f} s")
                case "hopeless":
                    what = f"rank 0 is gone and did not come back within {HOPELESS_S:g} s"
                    error = StageDiedError(what, stage=0, found=lost and lost.what, where=self._reader.leader)
                    self._events.end(advise(error), [task.command_id for task in tuple(self._active.values())])
                    return
