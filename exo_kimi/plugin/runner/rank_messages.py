"""What rank 0 tells the other ranks' runners beside steps: that it lives and is ready, that all are there, which tasks are over.

exo's states want it so: ranks stay connecting until the last one connects, and warm up until rank 0 does. And exo gives every
task to every rank, and takes it as complete once any rank says so; only rank 0 can say.

    rank i -> {"rank": i, "stage": "IP:PORT"}  when it connects, also anew; with its stage's address where exo's instance has none
    rank 0 -> {"beat": true}       again and again
    rank 0 -> {"connected": true}  when every rank has said so
    rank 0 -> {"ready": true}      when the stages work together
    rank 0 -> {"done": [ids]}      tasks that ended, in whatever way; the last of them also to a rank that connects anew
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future

import zmq.asyncio

from exo_kimi.errors import ExoKimiError, StageStalledError, StageUnreachableError
from exo_kimi.runtime.transport.address import Address, parse_address
from exo_kimi.runtime.transport.control import ControlClient, ControlListener, Message
from exo_kimi.runtime.transport.keys import ClusterKey

SILENCE_S = 30.0
AGAIN_S = 1.0
REMEMBERED = 1024  # tasks that ended before this rank had them


class RankMessagesListener:
    """Rank 0's side; lives on the event loop that made it.

    Args:
        channel: where the other ranks connect.
        ranks: how many there are, this one included.
    """

    def __init__(self, channel: ControlListener, *, ranks: int) -> None:
        self._channel = channel
        self.stages: dict[int, Address] = {}
        self._peers: dict[bytes, int] = {}
        self._missing = set(range(1, ranks))
        self._complete = asyncio.Event()
        self._ready = False
        self._done: deque[str] = deque(maxlen=REMEMBERED)
        self._task = asyncio.create_task(self._receive())

    @classmethod
    async def open(
        cls, context: zmq.asyncio.Context, listen: Address, *, ranks: int, key: ClusterKey
    ) -> RankMessagesListener:
        """Listen at the address that exo's instance gives rank 0.

        Raises:
            AddressError: it stays in use, or is not this machine's.
        """
        return cls(await ControlListener.open(context, listen, key=key, option="exo's hosts"), ranks=ranks)

    async def wait_complete(self, timeout_s: float) -> None:
        """Wait for every rank.

        Raises:
            StageUnreachableError: some did not come in time.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._complete.wait()
        except TimeoutError:
            raise StageUnreachableError(
                f"rank {min(self._missing)} did not connect to rank 0",
                stage=min(self._missing),
                expected=f"within {timeout_s:g} s, at {self._channel.address}",
                fix="see that its node runs `exo-kimi exo run` too, and restart the node whose runner hangs",
            ) from None

    def send_ready(self) -> None:
        """Tell every rank that the stages work together, also those that come later."""
        self._ready = True
        self._send({"ready": True})

    def send_done(self, task_ids: Iterable[str]) -> None:
        """Tell every rank that tasks are over."""
        done = list(task_ids)
        self._done.extend(done)
        self._send({"done": done})

    def send_beat(self) -> None:
        """Tell every rank that this one lives."""
        self._send({"beat": True})

    def close(self) -> None:
        """Stop listening."""
        self._task.cancel()
        self._channel.close()

    def _send(self, message: Message) -> None:
        for peer in tuple(self._peers):
            if not self._channel.send(peer, message):
                del self._peers[peer]

    async def _receive(self) -> None:
        while True:
            peer, message = await self._channel.receive()
            rank = message.get("rank")
            if not isinstance(rank, int):
                continue
            if isinstance(stage := message.get("stage"), str):
                self.stages[rank] = parse_address(stage, option=f"the address that rank {rank} told")
            self._peers[peer] = rank
            self._missing.discard(rank)
            if not self._missing:
                self._complete.set()
                self._send({"connected": True, "ready": self._ready})
                self._channel.send(peer, {"done": list(self._done)})


class RankMessagesReader:
    """Another rank's side. Once rank 0 was ready, a lost connection is made anew for as long as it takes.

    Args:
        leader: where rank 0 listens.
        rank: of this runner.
        key: the cluster's.
        connect_s: how long to try.
        stage: where this rank's stage listens, for a rank 0 that cannot know; None where exo's instance says it.
    """

    def __init__(
        self, leader: Address, rank: int, *, key: ClusterKey, connect_s: float, stage: Address | None = None
    ) -> None:
        self.leader = leader
        self.lost: ExoKimiError | None = None
        self._key, self._connect_s = key, connect_s
        self._hello = {"rank": rank} | ({} if stage is None else {"stage": str(stage)})
        self._heard_s = time.monotonic()
        self._closed = threading.Event()
        self._connected: Future[None] = Future()
        self._ready: Future[None] = Future()
        self._done: dict[str, None] = {}
        self._changed = threading.Condition()
        self._channel = self._connect()

    @property
    def silent_s(self) -> float:
        """Since rank 0 was heard."""
        return time.monotonic() - self._heard_s

    def wait_connected(self, timeout_s: float) -> None:
        """Wait until rank 0 says that every rank is there.

        Raises:
            StageStalledError: it did not in time.
            ExoKimiError: it cannot be reached, or was lost.
        """
        self._wait(self._connected, "did not see all ranks connect", timeout_s)

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until rank 0 says that the stages work together.

        Raises:
            StageStalledError: it did not in time.
            ExoKimiError: it was lost.
        """
        self._wait(self._ready, "did not become ready", timeout_s)

    def take_done(self, task_ids: Iterable[str], timeout_s: float) -> list[str]:
        """Those of the tasks that are over, after waiting a little for one."""
        wanted = tuple(task_ids)
        with self._changed:
            self._changed.wait_for(lambda: any(each in self._done for each in wanted), timeout_s)
            found = [each for each in wanted if each in self._done]
            for each in found:
                del self._done[each]
        return found

    def close(self) -> None:
        """End the connection."""
        self._closed.set()
        self._channel.close()

    def _connect(self) -> ControlClient:
        return ControlClient(
            self.leader,
            key=self._key,
            connect_s=self._connect_s,
            silence_s=SILENCE_S,
            hello=self._hello,
            on_message=self._on_message,
            on_lost=self._on_lost,
        )

    def _wait(self, what: Future[None], problem: str, timeout_s: float) -> None:
        try:
            what.result(timeout_s)
        except TimeoutError:
            raise StageStalledError(
                f"rank 0 {problem}", stage=0, expected=f"within {timeout_s:g} s", where=self.leader
            ) from None

    def _on_message(self, message: Message) -> None:
        self._heard_s = time.monotonic()
        self.lost = None
        for name, future in (("connected", self._connected), ("ready", self._ready)):
            if message.get(name) and not future.done():
                future.set_result(None)
        done = message.get("done")
        if isinstance(done, list):
            with self._changed:
                self._done.update(dict.fromkeys(map(str, done)))
                while len(self._done) > REMEMBERED:
                    del self._done[next(iter(self._done))]
                self._changed.notify_all()

    def _on_lost(self, error: ExoKimiError) -> None:
        self.lost = error
        was_ready = self._ready.done() and self._ready.exception() is None
        for each in (self._connected, self._ready):
            if not each.done():
                each.set_exception(error)
        if was_ready and not self._closed.wait(AGAIN_S):
            self._channel = self._connect()
            if self._closed.is_set():
                self._channel.close()
