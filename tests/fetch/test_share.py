"""`share` and `pull --from`: what the other machine has, whole or in part, encrypted, resumed and verified."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue

import pytest
from hub_stand_in import HubStandIn

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.doctor.doctor import doctor
from exo_kimi.errors import FetchError, KeyMismatchError, NotHeldError, ProtocolError, UsageError
from exo_kimi.fetch import sharing, transfer
from exo_kimi.fetch.command import PullCommand, pull_command
from exo_kimi.fetch.hub import HubSource
from exo_kimi.fetch.peer import ShareSource
from exo_kimi.fetch.pull import PullOptions, pull
from exo_kimi.fetch.sharing import SharedDirectory, serve_share
from exo_kimi.fetch.source import RemoteFile, TryAgainError
from exo_kimi.runtime.transport.address import Address
from exo_kimi.runtime.transport.keys import ClusterKey
from exo_kimi.runtime.transport.sealed import MOST_RECORD_BYTES, SessionKey

Hub = Callable[..., HubStandIn]
Share = Callable[..., Address]


@contextmanager
def sharing_of(directory: Path, key: ClusterKey | None, port: int = 0) -> Iterator[Address]:
    loop, bound = asyncio.new_event_loop(), SimpleQueue[Address]()

    def run() -> None:
        asyncio.set_event_loop(loop)
        task = loop.create_task(
            serve_share(SharedDirectory(directory), Address("127.0.0.1", port), key=key, announce=bound.put)
        )
        tasks.append(task)
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
        loop.close()

    tasks: list[asyncio.Task[None]] = []
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield bound.get(timeout=20)
    finally:
        loop.call_soon_threadsafe(tasks[0].cancel)
        thread.join(10)


@pytest.fixture
def key() -> ClusterKey:
    return ClusterKey.generate()


@pytest.fixture
def shared(key: ClusterKey) -> Iterator[Share]:
    with ExitStack() as stack:

        def start(directory: Path, port: int = 0) -> Address:
            return stack.enter_context(sharing_of(directory, key, port))

        yield start


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_a_whole_model_comes_byte_by_byte(shared: Share, whole: Path, key: ClusterKey, tmp_path: Path) -> None:
    report = pull(ShareSource(shared(whole), key=key), tmp_path / "here", PullOptions())
    assert files(tmp_path / "here") == files(whole)
    assert report.listing.model == whole.name
    assert doctor(tmp_path / "here", deep=True).healthy


def test_a_share_of_it_comes_cut(shared: Share, whole: Path, key: ClusterKey, tmp_path: Path) -> None:
    report = pull(ShareSource(shared(whole), key=key), tmp_path / "here", PullOptions(layers=(3, 7)))
    share = Checkpoint(tmp_path / "here")
    share.manifest(3, 7).check_here()
    assert share.fingerprint == Checkpoint(whole).fingerprint
    assert report.fetched_bytes < 0.8 * sum(map(len, files(whole).values()))
    diagnosis = doctor(tmp_path / "here", deep=True)
    assert diagnosis.healthy, diagnosis.to_text()


def test_the_half_that_the_other_machine_has(
    hub: Hub, shared: Share, whole: Path, key: ClusterKey, tmp_path: Path
) -> None:
    """One machine has layers 3:7 from the hub, the other those before; together, from each other, both have all."""
    served = hub(whole)
    for name, layers in (("one", (3, 7)), ("two", (0, 3))):
        pull(HubSource("org/kimi", endpoint=served.url), tmp_path / name, PullOptions(layers=layers))
    before = served.sent_bytes
    one = shared(tmp_path / "one")
    pull(ShareSource(one, key=key), tmp_path / "two", PullOptions())
    Checkpoint(tmp_path / "two").manifest().check_here()
    assert doctor(tmp_path / "two", deep=True).healthy
    pull(ShareSource(one, key=key), tmp_path / "three", PullOptions())
    assert files(tmp_path / "three") == files(tmp_path / "one")
    assert served.sent_bytes == before
    with pytest.raises(NotHeldError, match="does not have all of layers 1:4") as error:
        pull(ShareSource(one, key=key), tmp_path / "four", PullOptions(layers=(1, 4)))
    assert "the first of layer 1" in str(error.value)


def test_a_cut_in_the_middle_is_gone_on_with(
    shared: Share, whole: Path, key: ClusterKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every third answer ends with its connection; what came is not asked for again."""
    monkeypatch.setattr(transfer, "WAIT_S", 0.01)
    monkeypatch.setattr(sharing, "DATA_BYTES", 50_000)
    sent: list[int] = []
    send = sharing._BulkServer._send_all

    def broken(self: sharing._BulkServer, stream: sharing.SealedStream, data: bytes) -> None:
        sent.append(len(data))
        if len(sent) % 23 == 7:
            raise ConnectionResetError("cut")
        send(self, stream, data)

    monkeypatch.setattr(sharing._BulkServer, "_send_all", broken)
    pull(ShareSource(shared(whole), key=key), tmp_path / "here", PullOptions(connections=3))
    assert files(tmp_path / "here") == files(whole)
    assert sum(sent) < 1.15 * sum(map(len, files(whole).values()))


def test_ctrl_c_does_not_wait_for_a_silent_machine(shared: Share, whole: Path, key: ClusterKey) -> None:
    """`close` ends a read that waits for bytes; without it that takes as long as silence may last."""
    source = ShareSource(shared(whole), key=key)
    file = source.listing().files["config.json"]
    reading = source.read(file, 0, 10)
    assert len(next(reading)) == 10  # the answer's end is still to come
    stream = next(iter(source._open))
    source.close()
    with pytest.raises(ConnectionError):
        while True:
            stream.receive()
    reading.close()
    assert not source._open


def test_a_share_that_was_started_again_is_found_again(whole: Path, key: ClusterKey, tmp_path: Path) -> None:
    with sharing_of(whole, key) as address:
        source = ShareSource(address, key=key)
        first = source.listing()
    with pytest.raises(TryAgainError):
        list(source.read(first.files["config.json"], 0, 10))
    with sharing_of(whole, key, address.port):
        assert source.listing() == first


@pytest.mark.parametrize("other", [True, False])
def test_another_key_or_none_is_refused(shared: Share, whole: Path, tmp_path: Path, other: bool) -> None:
    address = shared(whole)
    with pytest.raises(KeyMismatchError, match="holds another cluster key"):
        pull(ShareSource(address, key=ClusterKey.generate() if other else None), tmp_path / "here", PullOptions())
    assert not (tmp_path / "here").exists()


def test_nobody_there_is_said(key: ClusterKey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exo_kimi.fetch.peer.CONNECT_S", 0.3)
    with pytest.raises(FetchError, match="the other machine does not answer"):
        ShareSource(Address("127.0.0.1", 9), key=key).listing()


def test_only_files_of_the_list_are_read(shared: Share, whole: Path, key: ClusterKey) -> None:
    source = ShareSource(shared(whole), key=key)
    for name in ("../kimi/config.json", "/etc/passwd", ".cache", "nothing"):
        with pytest.raises(NotHeldError, match="no such file is shared"):
            list(source.read(RemoteFile(name=name, size=10), 0, 10))
    size = (whole / "config.json").stat().st_size
    with pytest.raises(NotHeldError):
        list(source.read(RemoteFile(name="config.json", size=size), 0, size + 1))


def test_a_damaged_disk_is_found_by_the_sources_hash(
    shared: Share, whole: Path, key: ClusterKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written here is held against what lies there, once more from both disks."""
    source = ShareSource(shared(whole), key=key)
    asked: list[str] = []
    digest = source.digest
    monkeypatch.setattr(source, "digest", lambda file, ranges: asked.append(file.name) or digest(file, ranges))
    pull(source, tmp_path / "here", PullOptions())
    weights = sorted(path.name for path in whole.glob("*.safetensors"))
    assert sorted(asked) == weights
    ranges = ((0, 100), (200, 4000))
    data = (whole / weights[0]).read_bytes()
    listed = source.listing().files[weights[0]]
    assert digest(listed, ranges) == hashlib.sha256(data[:100] + data[200:4000]).hexdigest()


def test_strangers_on_the_bulk_port_get_nothing(shared: Share, whole: Path, key: ClusterKey) -> None:
    """No session, a session's id without its key, a connection's number again: closed, or unreadable."""
    source = ShareSource(shared(whole), key=key)
    session, port, _ = source._open_session()
    for greeting in (bytes(24), session.id + bytes(8)):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
            stranger.sendall(greeting + (20).to_bytes(4, "little") + bytes(20))
            with suppress(ConnectionResetError):
                assert stranger.recv(1) == b""
    source.listing()


def test_recorded_bytes_cannot_be_replayed_or_changed() -> None:
    session = SessionKey.generate()
    left, right = socket.socketpair()
    one, other = session.stream(left, 7, listens=False), session.stream(right, 7, listens=True)
    one.send(b"first")
    recorded = right.recv(1000, socket.MSG_PEEK)
    assert b"first" not in recorded
    assert other.receive() == (0, b"first")
    left.sendall(recorded)
    with pytest.raises(ProtocolError, match="changed on its way"):
        other.receive()
    changed = session.stream(right, 8, listens=True)
    left.sendall(recorded[:-1] + bytes([recorded[-1] ^ 1]))
    with pytest.raises(ProtocolError):
        changed.receive()
    assert session.secret.hex() not in repr(session)


def test_the_longest_record_passes_and_a_longer_one_is_refused() -> None:
    session = SessionKey.generate()
    left, right = socket.socketpair()
    one, other = session.stream(left, 7, listens=False), session.stream(right, 7, listens=True)
    data = os.urandom(MOST_RECORD_BYTES)
    sending = threading.Thread(target=one.send, args=(data, 3))
    sending.start()
    assert other.receive() == (3, data)
    sending.join()
    with pytest.raises(ProtocolError, match="too long"):
        one.send(data + b".")
    for text in (b"", b"last"):  # nothing of an earlier record stays
        one.send(text)
        assert other.receive() == (0, text)


def test_a_side_that_is_silent_is_given_up() -> None:
    session = SessionKey.generate()
    left, right = socket.socketpair()
    one, other = session.stream(left, 7, listens=False), session.stream(right, 7, listens=True)
    other.set_timeout(0.05)
    with pytest.raises(TimeoutError):
        other.receive()
    one.set_timeout(0.05)
    with pytest.raises(TimeoutError):
        for _ in range(100):  # more than lies in the socket's buffers
            one.send(bytes(MOST_RECORD_BYTES))


def test_pull_from_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to fetch"):
        pull_command(PullCommand(address="127.0.0.1:1"))
    with pytest.raises(UsageError, match="nothing to fetch"):
        pull_command(PullCommand())
    with pytest.raises(KeyMismatchError, match="needs the cluster key"):
        pull_command(PullCommand(address="192.0.2.1:1", output=tmp_path))
