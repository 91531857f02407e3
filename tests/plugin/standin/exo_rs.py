"""Stand-in for exo's Rust module `exo_rs`, over PyPI's eclipse-zenoh, so that exo's real Python code runs without Rust.

Same key layout as exo's networking crate: router mode, a liveliness token `live/<zid>`, topics under `topics/<name>`,
remote-only subscribers, blocking puts. What differs: no IPv6 multicast discovery; peers are dialled from EXO_RS_CONNECT
("tcp/127.0.0.2:52414,..."), and EXO_RS_LISTEN is the address to listen on. For tests on loopback only.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import threading
from collections import deque
from pathlib import Path
from typing import Any

import zenoh


class FromSwarm:
    """Something that arrived from the network."""


class _Connection(FromSwarm):
    __match_args__ = ("connected",)

    def __init__(self, connected: bool):
        self.connected = connected


class _Message(FromSwarm):
    __match_args__ = ("topic", "data")

    def __init__(self, topic: str, data: bytes):
        self.topic, self.data = topic, data


FromSwarm.Connection, FromSwarm.Message = _Connection, _Message


class NetworkingHandle:
    """Publish/subscribe handle. Created on one event loop and used on another, so the queue belongs to none."""

    @staticmethod
    def new(identity, namespace, listen_port, discovery_service_port):
        listen_ip = os.environ.get("EXO_RS_LISTEN", "127.0.0.1")
        endpoints = [e for e in os.environ.get("EXO_RS_CONNECT", "").split(",") if e]
        config = zenoh.Config()
        for key, value in {
            "id": f'"{identity}"',
            "mode": '"router"',
            "listen/endpoints": f'["tcp/{listen_ip}:{listen_port}"]',
            "connect/endpoints": str(endpoints).replace("'", '"'),
            "connect/timeout_ms": "0",
            "connect/exit_on_failure": "false",
            "scouting/multicast/enabled": "false",
            "scouting/gossip/multihop": "true",
            "adminspace/enabled": "true",
        }.items():
            config.insert_json5(key, value)
        return NetworkingHandle(zenoh.open(config))

    def __init__(self, session):
        self._session = session
        self._events: deque[FromSwarm] = deque()
        self._lock = threading.Lock()
        self._waiter: Any = None
        self._topics: dict[str, tuple[Any, Any]] = {}
        liveliness = session.liveliness()
        self._token = liveliness.declare_token(f"live/{session.zid()}")
        self._live = liveliness.declare_subscriber("live/*", self._on_live, history=True)

    def _push(self, event: FromSwarm):
        with self._lock:
            self._events.append(event)
            waiter, self._waiter = self._waiter, None
        if waiter:
            loop, future = waiter
            with contextlib.suppress(RuntimeError):  # that loop has closed
                loop.call_soon_threadsafe(lambda: future.done() or future.set_result(None))

    def _on_live(self, sample):
        self._push(_Connection(sample.kind == zenoh.SampleKind.PUT))

    async def recv(self):
        while True:
            with self._lock:
                if self._events:
                    return self._events.popleft()
                if self._waiter:
                    raise RuntimeError("called recv twice concurrently")
                loop = asyncio.get_running_loop()
                future = loop.create_future()
                mine = self._waiter = (loop, future)
            try:
                await future
            finally:
                with self._lock:
                    if self._waiter is mine:
                        self._waiter = None

    async def gossipsub_subscribe(self, topic):
        if topic in self._topics:
            return False
        publisher = self._session.declare_publisher(f"topics/{topic}", congestion_control=zenoh.CongestionControl.BLOCK)

        def on_sample(sample, topic=topic):
            if sample.kind == zenoh.SampleKind.PUT:
                self._push(_Message(topic, sample.payload.to_bytes()))

        subscriber = self._session.declare_subscriber(
            f"topics/{topic}", on_sample, allowed_origin=zenoh.Locality.REMOTE
        )
        self._topics[topic] = (subscriber, publisher)
        return True

    async def gossipsub_unsubscribe(self, topic):
        entry = self._topics.pop(topic, None)
        if not entry:
            return False
        subscriber, publisher = entry
        publisher.undeclare()
        subscriber.undeclare()
        return True

    async def gossipsub_publish(self, topic, data):
        if topic in self._topics:
            await asyncio.to_thread(self._topics[topic][1].put, data)


class PidfileError(Exception):
    """Another instance holds the file."""


class Pidfile:
    def __init__(self, path, mode):
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._fd)
            self._fd = None
            raise PidfileError(f"another instance is already running ({self._path})") from error

    def write(self):
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, str(os.getpid()).encode(), 0)

    def as_raw_fd(self):
        return self._fd

    def close(self):
        if self._fd is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = None

    __del__ = close
