"""Our callbacks in legacy exo: load this node's share when a prompt begins somewhere, or at start-up; free what ended; pass on
failures, and notice nodes that fall silent. exo calls observers synchronously and without a guard, so nothing here may raise.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

from exo_kimi.errors import ExoKimiError, ExoLoadError, OverloadedError, StageStalledError
from exo_kimi.plugin.legacy.node import FAILED, fail
from exo_kimi.plugin.legacy.plan import PinnedPlan
from exo_kimi.plugin.legacy.replies import Liveness, Replies
from exo_kimi.plugin.legacy.stage import LegacyStage

logger = logging.getLogger(__name__)
PRELOAD, LOADED, ALIVE, CANCELLED = "exo_kimi_preload", "exo_kimi_loaded", "exo_kimi_alive", "exo_kimi_cancelled"
HOOK = "preemptively_load_shard"
LOOK_S = 2.0  # as often as exo itself looks for peers
BEAT_S = 2.0
QUIET_S = 10.0  # a request that comes now is refused: one in progress may still go on
SILENCE_S = 30.0  # as between the stages of `exo-kimi serve`
_SEND_S = 5.0
Observer = Callable[[str, str], None]


class Failure:
    """In the place of tokens in the queue of exo's API, which unpacks it, and answers 500 with what that raises."""

    def __init__(self, error: ExoKimiError) -> None:
        self.error = error

    def __iter__(self) -> Iterator[Any]:
        raise self.error


@dataclass
class Hooks:
    """Callbacks of one node.

    Args:
        node: exo's.
        pinned: the plan.
        stage: this node's layers.
        shard: exo's Shard of them.
        replies: of this node.
        liveness: of the other nodes.
        queues: of exo's API, by request.
        original: exo's own hook, for other models.
        say: takes lines for the user.
    """

    node: Any
    pinned: PinnedPlan
    stage: LegacyStage
    shard: Any
    replies: Replies
    liveness: Liveness
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

    def watch(self) -> None:
        """Tell the other nodes that this one lives, and notice those that do not."""
        self._start(self._beat())
        self._start(self._look())

    def _on_status(self, request_id: str, text: str, status: dict[str, Any]) -> None:
        kind = status.get("type")
        if (sender := status.get("node_id")) in self.pinned.node_ids and sender != self.node.id:
            self.liveness.hear(str(sender))
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
        elif kind == CANCELLED:
            self._end(str(status.get("request_id")))
        elif kind == FAILED:
            message = f"{status.get('node_id')}: {status.get('message')}"
            error = OverloadedError(message) if status.get("busy") else ExoLoadError(message)
            self._failed(str(status.get("request_id")), error)

    def _failed(self, request_id: str, error: ExoKimiError) -> None:
        if request_id in self.replies.asked:
            self.queues[request_id].put_nowait(Failure(error))
        self._end(request_id)

    def _end(self, request_id: str) -> None:
        self.replies.end(request_id)
        self.node.outstanding_requests.pop(request_id, None)
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

    async def _beat(self) -> None:
        status = json.dumps({"type": ALIVE, "node_id": self.node.id})
        while True:
            for peer in self.node.peers:
                if peer.id() in self.pinned.node_ids:
                    self._start(self._send(peer, status))
            await asyncio.sleep(BEAT_S)

    async def _send(self, peer: Any, status: str) -> None:
        try:
            async with asyncio.timeout(_SEND_S):
                await peer.send_opaque_status("", status)
        except Exception as error:  # noqa: BLE001  # it is away, which it is for the others to notice
            logger.debug("%s could not be told: %s", peer.id(), error)

    async def _look(self) -> None:
        """Requests that wait for a silent node end; one of this node's own silences is nobody's fault."""
        before_s = time.monotonic()
        while True:
            await asyncio.sleep(BEAT_S / 2)
            now_s = time.monotonic()
            if now_s - before_s > 2 * BEAT_S:
                self.liveness.forgive()
            before_s = now_s
            found = self.liveness.silent(SILENCE_S)
            for request_id in tuple(self.replies.asked) if found is not None else ():
                error = StageStalledError(
                    silence_of(found), expected=f"a sign of life in {SILENCE_S:g} s", fix="look at that machine"
                )
                await fail(self.node, request_id, error, self.say)

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


def silence_of(found: tuple[str, float] | None) -> str:
    """Which node is silent, in words; empty when none is."""
    return "" if found is None else f"{found[0]} is silent for {found[1]:.0f} s"


async def cancel(node: Any, request_id: str) -> None:
    """Tell every node that nobody waits for a request any more."""
    status = {"type": CANCELLED, "node_id": node.id, "request_id": request_id}
    await node.broadcast_opaque_status(request_id, json.dumps(status))
