"""The control channel: JSON objects both ways, whatever else is refused, and an end that is told."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import pytest
import zmq.asyncio

from exo_kimi.errors import ExoKimiError, KeyMismatchError, StageUnreachableError
from exo_kimi.runtime.transport.address import Address
from exo_kimi.runtime.transport.control import ControlClient, ControlListener
from exo_kimi.runtime.transport.keys import ClusterKey

pytestmark = pytest.mark.timeout(60)


class Peer:
    """A client with what it was told."""

    def __init__(self, address: Address, key: ClusterKey) -> None:
        self.messages: SimpleQueue[Any] = SimpleQueue()
        self.lost: SimpleQueue[ExoKimiError] = SimpleQueue()
        self.client = ControlClient(
            address,
            key=key,
            connect_s=10.0,
            silence_s=30.0,
            hello={"rank": 1},
            on_message=self.messages.put,
            on_lost=self.lost.put,
        )


async def told(queue: SimpleQueue[Any]) -> Any:
    return await asyncio.to_thread(queue.get, timeout=30)


async def open_listener(context: zmq.asyncio.Context, key: ClusterKey) -> ControlListener:
    return await ControlListener.open(context, Address("127.0.0.1", 0), key=key, option="the test")


async def test_messages_go_both_ways_and_a_lost_listener_is_told() -> None:
    key, context = ClusterKey.generate(), zmq.asyncio.Context()
    try:
        listener = await open_listener(context, key)
        peer = Peer(listener.address, key)
        sender, hello = await listener.receive()
        assert hello == {"rank": 1}
        assert listener.send(sender, {"done": ["a"]})
        assert await told(peer.messages) == {"done": ["a"]}
        listener.close()
        assert isinstance(await told(peer.lost), StageUnreachableError)
    finally:
        context.destroy(linger=0)


async def test_what_is_no_message_is_passed_over(make_raw: Callable[[str, ClusterKey], Any]) -> None:
    key, context = ClusterKey.generate(), zmq.asyncio.Context()
    try:
        listener = await open_listener(context, key)
        raw = make_raw(listener.address.endpoint, key)
        for frame in ([b"{"], [b"[1]"], [b"{}", b"{}"], [b'"' + b"x" * (1 << 20) + b'"'], [b'{"good": 1}']):
            raw.send_multipart(frame)
        assert (await listener.receive())[1] == {"good": 1}
        listener.close()
    finally:
        context.destroy(linger=0)


@pytest.fixture
def make_raw() -> Any:
    context = zmq.Context()

    def make(endpoint: str, key: ClusterKey) -> Any:
        socket = context.socket(zmq.DEALER)
        socket.curve_serverkey = key.public
        socket.curve_publickey, socket.curve_secretkey = key.public, key.secret
        socket.connect(endpoint)
        return socket

    yield make
    context.destroy(linger=0)


async def test_another_key_is_an_error_and_not_a_silence() -> None:
    context = zmq.asyncio.Context()
    try:
        listener = await open_listener(context, ClusterKey.generate())
        peer = Peer(listener.address, ClusterKey.generate())
        assert isinstance(await told(peer.lost), KeyMismatchError)
        listener.close()
    finally:
        context.destroy(linger=0)


async def test_a_client_that_is_closed_ends_its_thread_and_tells_nothing() -> None:
    key, context = ClusterKey.generate(), zmq.asyncio.Context()
    try:
        listener = await open_listener(context, key)
        peer = Peer(listener.address, key)
        await listener.receive()
        peer.client.close()
        peer.client.close()
        while any(thread.name == "exo-kimi-control" for thread in threading.enumerate()):
            await asyncio.sleep(0.02)
        assert peer.lost.empty()
        listener.close()
    finally:
        context.destroy(linger=0)
