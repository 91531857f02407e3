"""A stage's link to the stage after it, for one epoch: hidden states go out, nothing but an end comes back."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import zmq.asyncio

from exo_kimi.errors import ExoKimiError, ProtocolError, RuntimeFault, StageUnreachableError
from exo_kimi.runtime.pairs.pairing_handshake import couple
from exo_kimi.runtime.protocol.frames import decode, encode
from exo_kimi.runtime.protocol.messages import Hello, HelloAck, Join
from exo_kimi.runtime.protocol.versions import Versions
from exo_kimi.runtime.transport.address import parse_address
from exo_kimi.runtime.transport.keys import ClusterKey
from exo_kimi.runtime.transport.link import Link
from exo_kimi.runtime.transport.zmq_link import connect

CONNECT_DEADLINE_S = 10.0  # the leader has reached the next stage already


async def open_next(
    context: zmq.asyncio.Context, join: Join, *, key: ClusterKey | None, leader: Hello, versions: Versions
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
        mine = replace(leader, role="upstream", exo_kimi=versions.exo_kimi, mlx=versions.mlx, mlx_lm=versions.mlx_lm)
        link.send(encode(mine))
        async with asyncio.timeout(CONNECT_DEADLINE_S):
            answer = decode(await link.receive())
        if not isinstance(answer, HelloAck):
            raise ProtocolError("the next stage refused", found=getattr(answer, "message", answer), where=address)
        if join.link != "zmq":
            link = await couple(link, join.link, epoch=join.epoch, deadline_s=leader.silence_s)
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
