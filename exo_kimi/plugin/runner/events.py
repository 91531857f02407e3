"""What a runner tells exo, through a sender that knows when `ready` would not be true.

exo believes a runner's last status. A rank that does not hear the others says `RunnerWarmingUp` in place of `RunnerReady` and
`RunnerRunning`: exo then keeps new requests until it is ready again, instead of handing them to a rank that cannot answer.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from exo_kimi.errors import ExoKimiError
from exo_kimi.plugin.api.refusal import Refusal
from exo_kimi.plugin.runner.beats import RunnerBeat

logger = logging.getLogger(__name__)
SERVING = ("RunnerReady", "RunnerRunning")
_FLUSH_S = 0.5  # exo's queue has a thread of its own; exo gives a runner three seconds


class RunnerEvents(Protocol):
    """What our engine tells exo beside its chunks. Safe in any thread."""

    def hold(self, why: str) -> None:
        """This rank is not ready, whatever else it says, until `release`."""
        ...

    def release(self) -> None:
        """It is as ready as it last said."""
        ...

    def explain(self, how: str) -> None:
        """Say how this rank works where that is not as usual, for the status."""
        ...

    def end(self, error: ExoKimiError, command_ids: Iterable[Any]) -> None:
        """This runner is of no use any more: tell those who wait, and have exo start it anew."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EventTypes:
    """exo's types of events, and what it takes for the reason of a runner's end (None: v1.0.71 takes none)."""

    RunnerWarmingUp: Any
    ChunkGenerated: Any
    ErrorChunk: Any
    termination: Callable[[Exception], Any] | None

    @classmethod
    def installed(cls) -> EventTypes:
        """Those of the exo around us."""
        bootstrap = importlib.import_module("exo.worker.runner.bootstrap")
        termination = getattr(bootstrap, "RunnerTerminationError", None)
        return cls(
            RunnerWarmingUp=importlib.import_module("exo.shared.types.worker.runners").RunnerWarmingUp,
            ChunkGenerated=importlib.import_module("exo.shared.types.events").ChunkGenerated,
            ErrorChunk=importlib.import_module("exo.shared.types.chunks").ErrorChunk,
            termination=None if termination is None else termination.from_exception,
        )


class TruthfulSender:
    """exo's sender of a runner's events, given to exo's runner in place of its own.

    Args:
        sender: exo's.
        model_id: exo's, for errors.
        types: exo's.
        beat: of this runner.
        leave: ends the process.
    """

    def __init__(
        self,
        sender: Any,
        model_id: Any,
        *,
        types: EventTypes,
        beat: RunnerBeat,
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        self._sender = sender
        self._model_id = model_id
        self._types = types
        self._beat = beat
        self._leave = leave
        self._lock = threading.Lock()
        self._status: Any = None
        self._held = False

    def send(self, event: Any) -> None:
        """Pass an event on; a status that would not be true becomes one that is."""
        with self._lock:
            if type(event).__name__ == "RunnerStatusUpdated":
                self._status = event
                if _serves(event):
                    self._beat.start()
                event = self._told(event)
            self._sender.send(event)

    def close(self) -> None:
        """As exo's."""
        self._sender.close()

    def join(self) -> None:
        """As exo's."""
        self._sender.join()

    def hold(self, why: str) -> None:
        self._beat.tell(waits_for=why)
        with self._lock:
            if not self._held:
                logger.warning("not ready: %s", why)
            changed, self._held = not self._held, True
            self._tell_again(changed)

    def release(self) -> None:
        self._beat.tell(waits_for=None)
        with self._lock:
            if self._held:
                logger.info("ready again")
            changed, self._held = self._held, False
            self._tell_again(changed)

    def explain(self, how: str) -> None:
        self._beat.tell(why=how)

    def end(self, error: ExoKimiError, command_ids: Iterable[Any]) -> None:
        logger.error("this runner ends, for exo to start it anew: %s", error)
        for command_id in command_ids:
            chunk = self._types.ErrorChunk(model=self._model_id, error_message=Refusal.of(error).to_text())
            self._sender.send(self._types.ChunkGenerated(command_id=command_id, chunk=chunk))
        if self._types.termination is not None:
            self._sender.send(self._types.termination(error))
        time.sleep(_FLUSH_S)
        self._leave(1)  # from whatever thread this is; exo's own waits in a queue for the next task

    def _told(self, event: Any) -> Any:
        if self._held and _serves(event):
            return type(event)(runner_id=event.runner_id, runner_status=self._types.RunnerWarmingUp())
        return event

    def _tell_again(self, changed: bool) -> None:
        if changed and self._status is not None and _serves(self._status):
            self._sender.send(self._told(self._status))


def _serves(event: Any) -> bool:
    return type(event.runner_status).__name__ in SERVING
