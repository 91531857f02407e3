"""What rank 0 tells the other ranks' runners beside steps: that all are there, that it is ready, and which tasks are over.

exo's states want it so: ranks stay connecting until the last one connects, and warm up until rank 0 does. And exo gives every
task to every rank, and takes it as complete once any rank says so; only rank 0 knows. Frames are JSON over the runtime's
ZeroMQ links. It knows nothing of tokens.

    rank i -> {"rank": i}          once
    rank 0 -> {"connected": true}  when every rank has said so
    rank 0 -> {"ready": true}      when the stages work together
    rank 0 -> {"done": [ids]}      tasks that ended, in whatever way
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future

import zmq.asyncio

from exo_kimi.errors import (
    AddressError,
    ExoKimiError,
    ProtocolError,
    StageDiedError,
    StageStalledError,
    StageUnreachableError,
)
from exo_kimi.runtime.transport.address import Address
from exo_kimi.runtime.transport.keys import ClusterKey
from exo_kimi.runtime.transport.zmq_link import connect
from exo_kimi.runtime.transport.zmq_listener import ZmqListener

logger = logging.getLogger(__name__)
BIND_S = 10.0  # the runner before this one may be about to end
SILENCE_S = 30.0
REMEMBERED = 1024  # tasks that ended before this rank had them
_MOST_BYTES = 1 << 20


class LedgerListener:
    """Rank 0's side; lives on the event loop that made it.

    Args:
        context: for its socket.
        listen: the address that exo's instance gives rank 0.
        ranks: how many there are, this one included.
        key: the cluster's.
    """

    def __init__(self, context: zmq.asyncio.Context, listen: Address, *, ranks: int, key: ClusterKey) -> None:
        self._listener = ZmqListener(context, listen, key=key, option="exo's hosts")
        self._peers: dict[bytes, int] = {}
        self._missing = set(range(1, ranks))
        self._complete = asyncio.Event()
        self._ready = False
        self._task = asyncio.create_task(self._receive())

    @classmethod
    async def open(
        cls, context: zmq.asyncio.Context, listen: Address, *, ranks: int, key: ClusterKey
    ) -> LedgerListener:
        """Listen, waiting a little for an address that is still in use.

        Raises:
            AddressError: it stays in use, or is not this machine's.
        """
        until_s = time.monotonic() + BIND_S
        while True:
            try:
                return cls(context, listen, ranks=ranks, key=key)
            except AddressError:
                if time.monotonic() > until_s:
                    raise
            await asyncio.sleep(0.5)

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
                expected=f"within {timeout_s:g} s, at {self._listener.address}",
                fix="see that its node runs `exo-kimi exo run` too, and restart the node whose runner hangs",
            ) from None

    async def ready(self) -> None:
        """Tell every rank, also those that come later."""
        self._ready = True
        await self._tell({"ready": True})

    async def done(self, task_ids: Iterable[str]) -> None:
        """Tell every rank that tasks are over."""
        await self._tell({"done": list(task_ids)})

    def close(self) -> None:
        """Stop listening."""
        self._task.cancel()
        self._listener.close()

    async def _tell(self, message: dict[str, object]) -> None:
        for peer in tuple(self._peers):
            if not self._listener.send(peer, _encode(message)):
                del self._peers[peer]

    async def _receive(self) -> None:
        while True:
            peer, parts = await self._listener.receive()
            try:
                rank = _decode(parts).get("rank")
            except ProtocolError as error:
                logger.warning("refused a frame: %s", error)
                continue
            if not isinstance(rank, int):
                continue
            self._peers[peer] = rank
            self._missing.discard(rank)
            if not self._missing:
                self._complete.set()
                await self._tell({"connected": True, "ready": self._ready})


class LedgerReader:
    """Another rank's side, in a thread of its own.

    Args:
        leader: where rank 0 listens.
        rank: of this runner.
        key: the cluster's.
        connect_s: how long to try.
    """

    def __init__(self, leader: Address, rank: int, *, key: ClusterKey, connect_s: float) -> None:
        self.lost: ExoKimiError | None = None
        self._leader = leader
        self._rank = rank
        self._key = key
        self._connect_s = connect_s
        self._connected: Future[None] = Future()
        self._ready: Future[None] = Future()
        self._done: dict[str, None] = {}
        self._changed = threading.Condition()
        self._loop: asyncio.AbstractEventLoop | None = None
        threading.Thread(target=self._run, name="exo-kimi-ledger", daemon=True).start()

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

    def _wait(self, what: Future[None], problem: str, timeout_s: float) -> None:
        try:
            what.result(timeout_s)
        except TimeoutError:
            raise StageStalledError(
                f"rank 0 {problem}", stage=0, expected=f"within {timeout_s:g} s", where=self._leader
            ) from None

    def take_done(self, task_ids: Iterable[str], timeout_s: float) -> list[str]:
        """Those of the tasks that are over, after waiting a little for one.

        Raises:
            StageDiedError: rank 0 is lost.
        """
        wanted = tuple(task_ids)
        with self._changed:
            self._changed.wait_for(lambda: self.lost or any(each in self._done for each in wanted), timeout_s)
            found = [each for each in wanted if each in self._done]
            for each in found:
                del self._done[each]
        if self.lost is not None and not found:
            raise StageDiedError("rank 0 is gone", stage=0, where=self._leader) from self.lost
        return found

    def close(self) -> None:
        """End the thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._task.cancel)

    def _run(self) -> None:
        try:
            asyncio.run(self._read())
        except asyncio.CancelledError:
            pass
        except ExoKimiError as error:
            with self._changed:
                self.lost = error
                self._changed.notify_all()
            for each in (self._connected, self._ready):
                if not each.done():
                    each.set_exception(error)

    async def _read(self) -> None:
        self._loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        context = zmq.asyncio.Context()
        try:
            link = await connect(context, self._leader, key=self._key, deadline_s=self._connect_s, silence_s=SILENCE_S)
            link.send(_encode({"rank": self._rank}))
            while True:
                self._hear(_decode(await link.receive()))
        finally:
            context.destroy(linger=0)

    def _hear(self, message: dict[str, object]) -> None:
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


def _encode(message: dict[str, object]) -> list[bytes]:
    return [json.dumps(message).encode()]


def _decode(parts: Sequence[bytes | memoryview]) -> dict[str, object]:
    try:
        message = json.loads(bytes(parts[0])) if len(parts) == 1 and len(parts[0]) < _MOST_BYTES else None
    except ValueError as error:
        raise ProtocolError("not JSON, in what the runners tell each other") from error
    if not isinstance(message, dict):
        raise ProtocolError("not a JSON object, in what the runners tell each other")
    return message
