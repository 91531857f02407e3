"""The sockets of a stage: what it does not expect ends them, for nothing may be lost silently."""

from __future__ import annotations

import threading
from pathlib import Path
from queue import SimpleQueue

import pytest
import zmq

from exo_kimi.runtime.protocol.versions import Versions
from exo_kimi.runtime.stage import server as stage_server
from exo_kimi.runtime.stage.compute_thread import StageStatus
from exo_kimi.runtime.stage.memory import FreeMemory
from exo_kimi.runtime.stage.server import StageServer
from exo_kimi.runtime.transport.address import parse_address


def test_an_error_that_nobody_expected_ends_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(parts: object) -> None:
        raise KeyError("a mistake of ours")

    monkeypatch.setattr(stage_server, "decode", broken)
    address = parse_address(f"ipc://{tmp_path}/s", option="--listen")
    server = StageServer(
        address,
        key=None,
        next_key=None,
        orders=SimpleQueue(),
        status=StageStatus(free=FreeMemory(free_bytes=1, scope="host")),
        versions=Versions.installed(),
        leader_may_vanish=False,
    )
    ended: list[BaseException] = []

    def serve() -> None:
        try:
            server.run()
        except KeyError as error:
            ended.append(error)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert server.bound.result(timeout=20) == address
    context = zmq.Context()
    try:
        socket = context.socket(zmq.DEALER)
        socket.linger = 0
        socket.connect(address.endpoint)
        socket.send(b"anything")
        thread.join(timeout=20)
    finally:
        context.destroy(linger=0)
    assert not thread.is_alive()
    assert [str(error) for error in ended] == ["'a mistake of ours'"]
