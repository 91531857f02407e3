"""Our callbacks in legacy exo: load this node's share when a prompt begins somewhere, or at start-up; free what ended; pass on
failures. exo calls observers synchronously and without a guard, so nothing here may raise.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

from exo_kimi.errors import ExoKimiError, ExoLoadError
from exo_kimi.plugin.legacy.node import FAILED, fail
from exo_kimi.plugin.legacy.plan import PinnedPlan
from exo_kimi.plugin.legacy.stage import LegacyStage

logger = logging.getLogger(__name__)
PRELOAD, LOADED = "exo_kimi_preload", "exo_kimi_loaded"
HOOK = "preemptively_load_shard"
LOOK_S = 2.0  # as often as exo itself looks for peers
Observer = Callable[[str, str], None]


class Failure:
    """In the place of tokens in the queue of exo's API, which unpacks it, and answers 500 with what that raises."""

    def __init__(self, message: str) -> None:
        self._message = message

    def __iter__(self) -> Iterator[Any]:
        raise ExoLoadError(self._message)


@dataclass
class Hooks:
    """Callbacks of one node.

    Args:
        node: exo's.
        pinned: the plan.
        stage: this node's layers.
        shard: exo's Shard of them.
        asked: requests that this node's API waits for.
        queues: of exo's API, by request.
        original: exo's own hook, for other models.
        say: takes lines for the user.
    """

    node: Any
    pinned: PinnedPlan
    stage: LegacyStage
    shard: Any
    asked: set[str]
    queues: Any
    original: Observer
    say: Callable[[str], None]
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def register(self) -> None:
        """In the place of exo's own hook, and beside its listeners for tokens."""
        self.node.on_opaque_status.deregister(HOOK)
        self.node.on_opaque_status.register(HOOK).on_next(self.on_status)
        self.node.on_token.register("exo_kimi").on_next(self.on_token)

    def on_status(self, request_id: str, opaque_status: str) -> None:
        """A status of this node or of another one."""
        try:
            status = json.loads(opaque_status)
            if isinstance(status, dict):
                self._on_status(request_id, opaque_status, status)
        except Exception:  # the edge to exo, which would die of it
            logger.exception("a status could not be handled")

    def on_token(self, request_id: str, tokens: Any, is_finished: bool) -> None:
        """Tokens of a reply, on every node."""
        try:
            if is_finished:
                self._end(request_id)
        except Exception:  # the edge to exo
            logger.exception("a reply's end could not be handled")

    def preload(self) -> None:
        """Load now, and ask every node of the plan to do so as soon as it is seen."""
        self._start(self._load(""))
        self._start(self._ask_others())

    def _on_status(self, request_id: str, text: str, status: dict[str, Any]) -> None:
        kind = status.get("type")
        if kind == "node_status":
            begins = status.get("status") == "start_process_prompt"
            if (status.get("shard") or {}).get("model_id") != self.pinned.name:
                self.original(request_id, text)
            elif begins and not self.stage.loaded:
                self._start(self._load(request_id))
        elif kind == PRELOAD and status.get("plan") == self.pinned.digest:
            self._start(self._load(""))
        elif kind == LOADED and status.get("node_id") != self.node.id:
            self.say(
                f"{status.get('node_id')} holds layers {status.get('start_layer')}:{status.get('end_layer')}: "
                f"{status.get('resident_bytes')} bytes resident"
            )
        elif kind == FAILED:
            self._failed(str(status.get("request_id")), str(status.get("message")), str(status.get("node_id")))

    def _failed(self, request_id: str, message: str, node_id: str) -> None:
        if request_id in self.asked:
            self.queues[request_id].put_nowait(Failure(f"{node_id}: {message}"))
        self.node.outstanding_requests.pop(request_id, None)
        self._end(request_id)

    def _end(self, request_id: str) -> None:
        self.asked.discard(request_id)
        self.stage.thread.submit(self.stage.release, request_id)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # the loop alone would let it be collected
        task.add_done_callback(self._tasks.discard)

    async def _load(self, request_id: str) -> None:
        before = self.stage.loaded
        try:
            await self.node.inference_engine.ensure_shard(self.shard)
        except ExoKimiError as error:
            await fail(self.node, request_id, error, self.say)
            return
        except Exception as error:  # nobody waits for this task
            logger.exception("loading failed")
            await fail(self.node, request_id, error, self.say)
            return
        if not before:
            await self._tell_loaded()

    async def _tell_loaded(self) -> None:
        own = self.pinned.own
        status = {
            "type": LOADED,
            "node_id": self.node.id,
            "start_layer": own.start_layer,
            "end_layer": own.end_layer,
            "resident_bytes": self.stage.resident_bytes,
        }
        await self.node.broadcast_opaque_status("", json.dumps(status))

    async def _ask_others(self) -> None:
        status = json.dumps({"type": PRELOAD, "node_id": self.node.id, "plan": self.pinned.digest})
        waiting = set(self.pinned.node_ids) - {self.node.id}
        while waiting:
            for peer in [peer for peer in self.node.peers if peer.id() in waiting]:
                try:
                    await peer.send_opaque_status("", status)
                    waiting.discard(peer.id())
                except Exception:  # a peer that is about to go; it is asked again
                    logger.warning("%s could not be asked to load", peer.id(), exc_info=True)
            await asyncio.sleep(LOOK_S)
