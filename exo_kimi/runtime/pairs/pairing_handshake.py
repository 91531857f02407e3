"""How two neighbouring stages make their pair on `mx.distributed`: who listens where, and by which device.

The proposal goes over the encrypted link that they have already; see `pairing.Pair` for what they agree on.
"""

from __future__ import annotations

import asyncio
import socket as sockets
import subprocess
from collections.abc import Callable
from functools import partial

from exo_kimi.errors import ProtocolError, RuntimeFault, StageUnreachableError
from exo_kimi.runtime.pairs.distributed_link import DistributedLink, PartCollector, announced_bytes
from exo_kimi.runtime.pairs.link_helper_client import LinkHelper
from exo_kimi.runtime.pairs.pairing import Pair, rdma_device
from exo_kimi.runtime.protocol.frames import decode, encode
from exo_kimi.runtime.protocol.messages import Backend, PairAnswer, PairOffer
from exo_kimi.runtime.steps import Step
from exo_kimi.runtime.transport.address import Address
from exo_kimi.runtime.transport.link import Link, Part

PAIR_DEADLINE_S = 15.0
"""For both link helpers to start and meet; the ring tries to connect five times, a second apart and more."""


async def connect_pair(
    link: Link, backend: Backend, *, epoch: int, deadline_s: float, known_device: str | None = None
) -> Link:
    """Make a pair with the stage at the other end of a link, as the side that sends.

    Args:
        link: to it, after the handshake.
        backend: of `mx.distributed`.
        epoch: the pair is for.
        deadline_s: for each frame that is sent over it.
        known_device: of this machine, for RDMA to the other; None finds it by the address.

    Raises:
        StageUnreachableError: the pair cannot be made.
        ProtocolError: the other side refused.
    """
    host = await _ipv4(link.address)
    mine = own_address_towards(host)
    device = await _device(backend, mine, known_device)
    proposal = PairOffer(
        epoch=epoch, backend=backend, sender=f"{mine}:{_free_port(mine)}", sender_device=device, host=host
    )
    link.send(encode(proposal))
    async with asyncio.timeout(PAIR_DEADLINE_S):
        answer = decode(await link.receive())
    if not isinstance(answer, PairAnswer) or answer.epoch != epoch:
        raise ProtocolError("the next stage refused", found=getattr(answer, "message", answer), where=link.address)
    helper = await LinkHelper.start(_pair(proposal, answer), 0, deadline_s=PAIR_DEADLINE_S)
    return DistributedLink(link, helper, deadline_s=deadline_s)


class IncomingPair:
    """The pair that the stage before has made, if it has: the side that receives.

    Args:
        on_step: takes every step that arrives.
        on_lost: takes an epoch and why its pair is lost.
        known_device: of this machine, for RDMA to the stage before; None finds it by the address.
    """

    def __init__(
        self,
        *,
        on_step: Callable[[Step], None],
        on_lost: Callable[[int, RuntimeFault], None],
        known_device: str | None = None,
    ) -> None:
        self._known_device = known_device
        self._on_step = on_step
        self._on_lost = on_lost
        self._current: tuple[int, PartCollector] | None = None

    async def answer(self, proposal: PairOffer, *, deadline_s: float) -> PairAnswer:
        """Begin to make a pair, in place of the one before.

        Raises:
            StageUnreachableError: no such address or device here.
        """
        self.end()
        device = await _device(proposal.backend, proposal.host, self._known_device)
        receiver = f"{proposal.host}:{_free_port(proposal.host)}"
        answer = PairAnswer(epoch=proposal.epoch, receiver=receiver, receiver_device=device)
        making = LinkHelper.start(_pair(proposal, answer), 1, deadline_s=PAIR_DEADLINE_S)
        on_lost = partial(self._on_lost, proposal.epoch)
        self._current = (
            proposal.epoch,
            PartCollector(making, deadline_s=deadline_s, on_frame=self._decode, on_lost=on_lost),
        )
        return answer

    def takes(self, parts: list[Part]) -> bool:
        """Whether a frame of the stage before was an announcement; it is then taken care of."""
        size = announced_bytes(parts)
        if size is None or self._current is None:
            return False
        self._current[1].put(parts, size)
        return True

    def end(self, *, but_epoch: int | None = None) -> None:
        """Drop the pair, unless it is for an epoch that this stage is only about to join."""
        if self._current is not None and self._current[0] != but_epoch:
            self._current[1].close()
            self._current = None

    def _decode(self, parts: list[Part]) -> None:
        step = decode(parts)
        if not isinstance(step, Step):
            raise ProtocolError("the stage before sent what is no step", found=type(step).__name__)
        self._on_step(step)


def _pair(proposal: PairOffer, answer: PairAnswer) -> Pair:
    return Pair(
        backend=proposal.backend,
        sender=proposal.sender,
        receiver=answer.receiver,
        sender_device=proposal.sender_device,
        receiver_device=answer.receiver_device,
    )


async def _ipv4(address: Address) -> str:
    """An IPv4 address as a number: MLX's ring reads no other."""
    if address.path is not None:
        return "127.0.0.1"
    try:
        found = await asyncio.get_running_loop().getaddrinfo(address.host, address.port, family=sockets.AF_INET)
    except OSError as error:
        raise StageUnreachableError("no IPv4 address", found=error.strerror, where=address) from error
    return str(found[0][4][0])


def own_address_towards(host: str) -> str:
    """The address of this machine from which it reaches a host; nothing is sent."""
    with sockets.socket(sockets.AF_INET, sockets.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return str(probe.getsockname()[0])


def _free_port(host: str) -> int:
    with sockets.socket() as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            raise StageUnreachableError(
                "this machine does not have the address that it is reached by",
                found=error.strerror,
                where=host,
                fix="a link over mx.distributed needs neighbours that see each other without translation",
            ) from error
        return int(probe.getsockname()[1])


async def _device(backend: Backend, ip: str, known: str | None) -> str | None:
    if backend != "jaccl":
        return None
    if known is not None:
        return known
    try:
        found = await asyncio.to_thread(subprocess.run, ["ifconfig"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise StageUnreachableError("the network interfaces cannot be listed", found=error) from error
    return rdma_device(found.stdout, ip)
