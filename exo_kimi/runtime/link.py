"""What the runtime needs of a connection between members; it knows frames as parts of bytes, and no carrier.

A link joins one connecting side to one listener. Frames arrive whole, in order and once, or the link is lost. ZeroMQ carries
them (`zmq_link`, `zmq_listener`); another carrier, such as RDMA over Thunderbolt, can take its place behind these protocols.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from exo_kimi.runtime.address import Address
from exo_kimi.runtime.step_frames import Part


class Link(Protocol):
    """One end of a connection that this side opened."""

    address: Address

    def send(self, parts: Sequence[Part]) -> None:
        """Queue a frame. Raises StageUnreachableError when the link is lost or its queue is full; never waits long."""
        ...

    async def receive(self) -> list[Part]:
        """The next frame. Raises StageUnreachableError once the link is lost and every frame before was received."""
        ...

    def close(self) -> None:
        """Drop the connection and what is queued; idempotent."""
        ...


class Listener(Protocol):
    """The side that others connect to; a peer is an opaque id, which a reconnecting peer does not keep."""

    address: Address

    async def send(self, peer: bytes, parts: Sequence[Part]) -> bool:
        """Queue a frame for a peer; False when it is gone."""
        ...

    async def receive(self) -> tuple[bytes, list[Part]]:
        """The next frame of any peer."""
        ...

    def close(self) -> None:
        """Stop listening; idempotent."""
        ...
