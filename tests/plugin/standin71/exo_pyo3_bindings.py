"""exo v1.0.71's Rust module, by the stand-in for the later one (`exo_rs.py`, over eclipse-zenoh); for tests on loopback only.

What differs there: nodes are known by keys, peers are named when they come and go, and messages say whose they are.
"""

from __future__ import annotations

import os
from typing import Any

import exo_rs
import zenoh


class AllQueuesFullError(Exception):
    """Never raised here: puts block."""


class MessageTooLargeError(Exception):
    """Never raised here."""


class NoPeersSubscribedToTopicError(Exception):
    """Never raised here."""


class Keypair:
    """An identity; here no more than zenoh's id."""

    def __init__(self, node_id: str) -> None:
        self._node_id = node_id

    @staticmethod
    def generate() -> Keypair:
        return Keypair(os.urandom(16).hex().lstrip("0"))

    def to_node_id(self) -> str:
        return self._node_id


class PyFromSwarm:
    """Something that arrived from the network."""


class _Connection(PyFromSwarm):
    __match_args__ = ("peer_id", "connected")

    def __init__(self, peer_id: str, connected: bool) -> None:
        self.peer_id, self.connected = peer_id, connected


class _Message(PyFromSwarm):
    __match_args__ = ("origin", "topic", "data")

    def __init__(self, origin: str, topic: str, data: bytes) -> None:
        self.origin, self.topic, self.data = origin, topic, data


PyFromSwarm.Connection, PyFromSwarm.Message = _Connection, _Message  # type: ignore[attr-defined]


def _on_live(handle: Any, sample: Any) -> None:
    peer_id = str(sample.key_expr).rpartition("/")[2]
    handle._push(_Connection(peer_id, sample.kind == zenoh.SampleKind.PUT))


exo_rs.NetworkingHandle._on_live = _on_live


class NetworkingHandle:
    """exo's handle, with the constructor and the events of v1.0.71."""

    def __init__(self, identity: Keypair, bootstrap_peers: list[str], listen_port: int) -> None:
        self._handle = exo_rs.NetworkingHandle.new(identity.to_node_id(), "", listen_port, 0)

    async def recv(self) -> PyFromSwarm:
        event = await self._handle.recv()
        return event if isinstance(event, PyFromSwarm) else _Message("", event.topic, event.data)

    async def gossipsub_subscribe(self, topic: str) -> bool:
        return bool(await self._handle.gossipsub_subscribe(topic))

    async def gossipsub_unsubscribe(self, topic: str) -> bool:
        return bool(await self._handle.gossipsub_unsubscribe(topic))

    async def gossipsub_publish(self, topic: str, data: bytes) -> None:
        await self._handle.gossipsub_publish(topic, data)
