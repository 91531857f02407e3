"""A connection between the leader and a stage, or between two stages: frames of byte parts, whatever carries them.

A link joins one connecting side to one listener. Frames arrive whole, in order and once, or the link is lost. ZeroMQ carries
them (`zmq_link`, `zmq_listener`); another carrier, such as RDMA over Thunderbolt, can take its place behind these protocols.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from exo_kimi.runtime.transport.address import Address

MAX_PART_BYTES = 1 << 30  # K2's hidden states of a chunk of 16,384 tokens in float32 take 470 MB
Part = bytes | memoryview


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
