"""The IO thread of a stage process: frames in and out, heartbeats, who may give orders, and the link to the next stage.

It goes on answering while the main thread loads or computes, so that silence means that the process is stuck or gone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any

import zmq.asyncio
from msgspec import structs

from exo_kimi.errors import ExoKimiError, ProtocolError, RuntimeFault, StageUnreachableError
from exo_kimi.runtime.pairs.pairing_handshake import PAIR_DEADLINE_S, IncomingPair, connect_pair
from exo_kimi.runtime.protocol.faults import to_message
from exo_kimi.runtime.protocol.frames import Message, decode, encode
from exo_kimi.runtime.protocol.messages import Goodbye, Hello, HelloAck, Join, Joined, Load, PairOffer, Ping, Refused
from exo_kimi.runtime.protocol.versions import Versions
from exo_kimi.runtime.stage.compute_thread import DropSequences, Order, StageStatus, Unload
from exo_kimi.runtime.stage.worker import as_fault
from exo_kimi.runtime.steps import NO_EPOCH, Step
from exo_kimi.runtime.transport.address import Address, parse_address
from exo_kimi.runtime.transport.keys import ClusterKey
from exo_kimi.runtime.transport.link import Link, Part
from exo_kimi.runtime.transport.zmq_link import connect
from exo_kimi.runtime.transport.zmq_listener import ZmqListener

logger = logging.getLogger(__name__)
CONNECT_DEADLINE_S = 10.0  # the leader has reached the next stage already
KEEP_WEIGHTS_S = 60.0  # after a leader is lost, for one that comes back with the same plan; caches for the same one


@dataclass(slots=True)
class _Leader:
    peer: bytes
    hello: Hello
    heard_s: float


class StageServer:
    """Serves one leader at a time.

    Args:
        listen: where.
        key: the cluster key for the listening side, needed unless `listen` is loopback.
        next_key: the same for the link to the next stage.
        orders: what the main thread is to do.
        status: how the main thread fares.
        versions: of this process.
        leader_may_vanish: whether a silent leader is given up; a child's own parent is watched in another way.
        rdma_device: of this machine, for pairs over RDMA with both neighbours; None finds each by its address.
    """

    def __init__(
        self,
        listen: Address,
        *,
        key: ClusterKey | None,
        next_key: ClusterKey | None,
        orders: SimpleQueue[Order],
        status: StageStatus,
        versions: Versions,
        leader_may_vanish: bool,
        rdma_device: str | None = None,
    ) -> None:
        self.bound: Future[Address] = Future()
        self._listen = listen
        self._key = key
        self._next_key = next_key
        self._orders = orders
        self._status = status
        self._versions = versions
        self._leader_may_vanish = leader_may_vanish
        self._leader: _Leader | None = None
        self._upstream: bytes | None = None
        self._lost_s: float | None = None
        self._session: str | None = None  # of the leader whose sequences the main thread holds
        self._next: Link | None = None
        self._joining: asyncio.Task[None] | None = None
        self._pairing: asyncio.Task[None] | None = None
        self._reset: asyncio.Future[Joined] | None = None
        self._is_first = False
        self._rdma_device = rdma_device
        self._incoming = IncomingPair(on_step=self._take, on_lost=self._send_fault, known_device=rdma_device)

    def run(self) -> None:
        """Serve until `stop`; the body of the IO thread. `bound` gets the address, or why there is none."""
        try:
            asyncio.run(self._serve())
        except ExoKimiError as error:
            if self.bound.done():
                raise
            self.bound.set_exception(error)

    def post(self, message: Message) -> None:
        """Take an answer from the main thread. Encoding is done there: this thread stays free for heartbeats."""
        parts = encode(message)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._guard, self._deliver, message, parts)

    def stop(self) -> None:
        """End `run`, from another thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stopped.set)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        self._broken: asyncio.Future[None] = self._loop.create_future()
        self._context = zmq.asyncio.Context()
        try:
            on_frame = partial(self._guard, self._on_frame)
            self._listener = ZmqListener(
                self._context, self._listen, key=self._key, option="--listen", on_frame=on_frame
            )
            self.bound.set_result(self._listener.address)
            work: list[asyncio.Future[Any]] = [
                self._broken,
                asyncio.create_task(self._beat()),
                asyncio.create_task(self._stopped.wait()),
            ]
            done, pending = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
            for future in pending:
                future.cancel()
            for future in done:
                future.result()
        finally:
            self._leave_epoch()
            self._context.destroy(linger=200)

    def _guard(self, work: Callable[..., object], *arguments: Any) -> None:
        """Run the body of a callback. What it does not expect ends the server: asyncio would log it and a frame be lost."""
        try:
            work(*arguments)
        except Exception as error:  # noqa: BLE001  `run` raises it
            if not self._broken.done():
                self._broken.set_exception(error)

    def _on_frame(self, peer: bytes, parts: list[Part]) -> None:
        if peer == self._upstream and self._incoming.takes(parts):
            return
        try:
            message = decode(parts)
        except ProtocolError as error:
            known = peer == self._upstream or (self._leader is not None and peer == self._leader.peer)
            logger.log(logging.WARNING if known else logging.DEBUG, "refused a frame: %s", error)
            self._send(peer, Refused(message=str(error), retry=False))
            return
        if isinstance(message, Hello):
            self._on_hello(peer, message)
        elif self._leader is not None and peer == self._leader.peer:
            self._leader.heard_s = time.monotonic()
            self._on_order(message, self._leader.hello)
        elif isinstance(message, Step) and peer == self._upstream:
            self._take(message)
        elif isinstance(message, PairOffer) and peer == self._upstream:
            if self._pairing is not None:
                self._pairing.cancel()
            self._pairing = asyncio.create_task(self._answer_pair_offer(peer, message))
            self._pairing.add_done_callback(self._pairing_done)
        else:
            self._send(peer, Refused(message="say hello first", retry=True))

    def _on_hello(self, peer: bytes, hello: Hello) -> None:
        leader = self._leader
        other = leader is not None and leader.hello.session != hello.session
        # The leader before may be gone and not yet missed.
        if leader is not None and other and not self._send(leader.peer, self._status.progress()):
            self._lose_leader()
            other = False
        if other or (hello.role == "upstream" and self._leader is None):
            self._send(peer, Refused(message="this stage serves another leader", retry=True))
            return
        if hello.role == "upstream":
            self._upstream = peer
        else:
            if self._leader is None:
                logger.info("a leader joined (exo-kimi %s)", hello.exo_kimi)
            if hello.session != self._session:
                self._session = hello.session
                self._orders.put(DropSequences())
            self._leader = _Leader(peer, hello, time.monotonic())
            self._lost_s = None
        self._send(peer, self._status.hello_ack(self._versions))

    async def _answer_pair_offer(self, peer: bytes, proposal: PairOffer) -> None:
        """The stage before wants a link of its own for hidden states."""
        deadline_s = self._leader.hello.silence_s if self._leader is not None else PAIR_DEADLINE_S
        try:
            self._send(peer, await self._incoming.answer(proposal, deadline_s=deadline_s))
        except (StageUnreachableError, OSError) as error:
            self._send(peer, Refused(message=str(error), retry=False))

    def _pairing_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self._guard(task.result)

    def _on_order(self, message: Message, leader: Hello) -> None:
        if isinstance(message, Step):
            if self._is_first:
                self._take(message)
        elif isinstance(message, Load):
            self._leave_epoch()
            self._is_first = message.start_layer == 0
            self._orders.put(message)
        elif isinstance(message, Join):
            self._leave_epoch(but_epoch=message.epoch)
            self._status.newest_epoch = message.epoch
            self._reset = self._loop.create_future()
            self._orders.put(message)
            self._joining = asyncio.create_task(self._join(message, leader, self._reset))
        elif isinstance(message, Goodbye):
            logger.info("the leader left")
            self._forget_leader()
            self._orders.put(Unload())
        elif not isinstance(message, Ping):
            logger.warning("a leader does not send %s", type(message).__name__)

    def _take(self, step: Step) -> None:
        if step.epoch == self._status.newest_epoch:
            self._orders.put(step)

    async def _join(self, join: Join, leader: Hello, reset: asyncio.Future[Joined]) -> None:
        """Link to the next stage while the main thread drops its sequences; say so; then watch the link."""
        try:
            if join.next_address is not None:
                self._next = await open_next(
                    self._context,
                    join,
                    key=self._next_key,
                    leader=leader,
                    versions=self._versions,
                    rdma_device=self._rdma_device,
                )
            self._send_to_leader(await reset)
            if self._next is not None:
                await watch_next(self._next)
        except Exception as error:  # noqa: BLE001  the leader waits for an answer, whatever it is
            self._send_fault(join.epoch, as_fault(error, stage=None))

    def _send_fault(self, epoch: int, error: RuntimeFault) -> None:
        if epoch == self._status.newest_epoch:
            logger.warning("a link between stages: %s", error)
            message = to_message(error, epoch, None)
            what = f"a link with its neighbour: {message.what}"
            self._send_to_leader(structs.replace(message, cause="link", what=what))

    def _deliver(self, message: Message, parts: list[Part]) -> None:
        epoch = getattr(message, "epoch", None)
        if epoch is not None and epoch != self._status.newest_epoch:
            return
        if isinstance(message, Joined):
            if self._reset is not None and not self._reset.done():
                self._reset.set_result(message)
        elif isinstance(message, Step):
            if self._next is not None:
                try:
                    self._next.send(parts)
                except StageUnreachableError as error:
                    self._send_fault(message.epoch, error)
        elif self._leader is not None:
            self._listener.send(self._leader.peer, parts)

    async def _beat(self) -> None:
        """Heartbeats out, and the leader's watched. A gap of this thread's own (a suspended machine) is not its fault."""
        while True:
            interval_s = self._leader.hello.heartbeat_s if self._leader is not None else 1.0
            before_s = time.monotonic()
            await asyncio.sleep(interval_s)
            now_s = time.monotonic()
            leader = self._leader
            if leader is None:
                if self._lost_s is not None and now_s - self._lost_s > KEEP_WEIGHTS_S:
                    logger.info("no leader came back: the weights are freed")
                    self._lost_s = None
                    self._orders.put(Unload())
                continue
            if now_s - before_s > 2 * interval_s + 1.0:
                leader.heard_s = now_s
            silent = self._leader_may_vanish and now_s - leader.heard_s > leader.hello.silence_s
            # A leader whose connection is gone cannot be sent to: that is known at once.
            if silent or not self._send(leader.peer, self._status.progress()):
                self._lose_leader()

    def _lose_leader(self) -> None:
        logger.warning("the leader is gone: what it had here is kept for %.0f s, another one may come", KEEP_WEIGHTS_S)
        self._forget_leader()
        self._lost_s = time.monotonic()

    def _forget_leader(self) -> None:
        self._leader = self._upstream = None
        self._leave_epoch()

    def _leave_epoch(self, *, but_epoch: int | None = None) -> None:
        self._incoming.end(but_epoch=but_epoch)
        self._status.newest_epoch = NO_EPOCH
        if self._joining is not None:
            self._joining.cancel()
            self._joining = None
        if self._next is not None:
            self._next.close()
            self._next = None

    def _send_to_leader(self, message: Message) -> None:
        if self._leader is not None:
            self._send(self._leader.peer, message)

    def _send(self, peer: bytes, message: Message) -> bool:
        return self._listener.send(peer, encode(message))


async def open_next(
    context: zmq.asyncio.Context,
    join: Join,
    *,
    key: ClusterKey | None,
    leader: Hello,
    versions: Versions,
    rdma_device: str | None = None,
) -> Link:
    """Connect to the next stage and say hello on behalf of the leader's session, then make the pair that `join` asks for.

    Raises:
        RuntimeFault: it cannot be reached, holds another key, or serves another leader.
    """
    address = str(join.next_address)
    link: Link | None = None
    try:
        where = parse_address(address, option="the next stage's address")
        # A dead machine closes no connection: its silence ends the link, a little after the leader would have noticed.
        link = await connect(
            context,
            where,
            key=None if where.path is not None else key,
            deadline_s=CONNECT_DEADLINE_S,
            silence_s=1.5 * leader.silence_s,
        )
        mine = structs.replace(
            leader, role="upstream", exo_kimi=versions.exo_kimi, mlx=versions.mlx, mlx_lm=versions.mlx_lm
        )
        link.send(encode(mine))
        async with asyncio.timeout(CONNECT_DEADLINE_S):
            answer = decode(await link.receive())
        if not isinstance(answer, HelloAck):
            raise ProtocolError("the next stage refused", found=getattr(answer, "message", answer), where=address)
        if join.link != "zmq":
            link = await connect_pair(
                link, join.link, epoch=join.epoch, deadline_s=leader.silence_s, known_device=rdma_device
            )
        return link
    except BaseException as error:
        if link is not None:
            link.close()
        if isinstance(error, TimeoutError):
            raise StageUnreachableError("the next stage does not answer", where=address) from error
        if isinstance(error, ExoKimiError) and not isinstance(error, RuntimeFault):
            raise StageUnreachableError(str(error)) from error
        raise


async def watch_next(link: Link) -> None:
    """Wait for the end of the link; nothing else is to be said on it.

    Raises:
        RuntimeFault: always, in the end.
    """
    answer = decode(await link.receive())
    raise ProtocolError("the next stage refused", found=getattr(answer, "message", answer), where=link.address)
