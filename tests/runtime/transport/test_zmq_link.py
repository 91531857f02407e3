"""Links: frames in order, every way to be refused is a clear error in time, and strangers do no harm."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import zmq
import zmq.asyncio
from hypothesis import given
from hypothesis import strategies as st

from exo_kimi.errors import AddressError, KeyMismatchError, StageUnreachableError, UsageError
from exo_kimi.runtime.transport.address import Address, numeric_host, parse_address
from exo_kimi.runtime.transport.keys import ClusterKey, find_key
from exo_kimi.runtime.transport.zmq_link import ZmqLink, connect, read_mechanism
from exo_kimi.runtime.transport.zmq_listener import ZmqListener

LOOPBACK = Address("127.0.0.1", 0)
Listen = Callable[..., ZmqListener]


@pytest.fixture
async def context() -> AsyncIterator[zmq.asyncio.Context]:
    made = zmq.asyncio.Context()
    yield made
    made.destroy(linger=0)


@pytest.fixture
async def other_context() -> AsyncIterator[zmq.asyncio.Context]:
    """As of another process: a gatekeeper answers for one context only."""
    made = zmq.asyncio.Context()
    yield made
    made.destroy(linger=0)


@pytest.fixture
async def listen(other_context: zmq.asyncio.Context) -> AsyncIterator[Listen]:
    made: list[ZmqListener] = []

    def start(address: Address = LOOPBACK, key: ClusterKey | None = None) -> ZmqListener:
        made.append(ZmqListener(other_context, address, key=key, option="--listen"))
        return made[-1]

    yield start
    for listener in made:
        listener.close()


async def reach(
    context: zmq.asyncio.Context, address: Address, key: ClusterKey | None = None, deadline_s: float = 20.0
) -> ZmqLink:
    return await connect(context, address, key=key, deadline_s=deadline_s)


@pytest.mark.parametrize("with_key", [False, True])
async def test_frames_arrive_whole_in_order_and_are_answered(
    context: zmq.asyncio.Context, listen: Listen, with_key: bool
) -> None:
    key = ClusterKey.generate() if with_key else None
    listener = listen(key=key)
    link = await reach(context, listener.address, key)
    sent = [[b"%d" % index, bytes(index), os.urandom(100_000)] for index in range(20)]
    for parts in sent:
        link.send(parts)
    arrived = [await listener.receive() for _ in sent]
    assert [[bytes(part) for part in parts] for _, parts in arrived] == sent
    assert listener.send(arrived[0][0], [b"yes"])
    assert await link.receive() == [b"yes"]
    link.close()


async def test_no_frame_is_forgotten_when_both_sides_send_at_once(context: zmq.asyncio.Context, listen: Listen) -> None:
    # The descriptor tells only of changes: a frame that came while this side was sending must be found all the same.
    listener = listen()
    link = await reach(context, listener.address)
    link.send([b"0"])
    peer, _ = await listener.receive()

    async def talk(send: Callable[[list[bytes]], object]) -> None:
        for number in range(300):
            send([b"%d" % number])
            if number % 7 == 0:
                await asyncio.sleep(0)

    await asyncio.gather(talk(link.send), talk(lambda parts: listener.send(peer, parts)))
    async with asyncio.timeout(30):
        there = [bytes((await listener.receive())[1][0]) for _ in range(300)]
        here = [bytes((await link.receive())[0]) for _ in range(300)]
    assert there == here == [b"%d" % number for number in range(300)]
    link.close()


async def test_a_socket_file_carries_frames_too(
    context: zmq.asyncio.Context, listen: Listen, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = Path("/tmp") / f"exo-kimi-test-{os.getpid()}.sock"
    try:
        listener = listen(Address("", 0, str(path)))
        link = await reach(context, listener.address)
        link.send([b"hello"])
        assert (await listener.receive())[1] == [b"hello"]
        link.close()
    finally:
        path.unlink(missing_ok=True)


async def test_a_lost_link_delivers_what_came_before_and_then_says_so(
    context: zmq.asyncio.Context, listen: Listen
) -> None:
    listener = listen()
    link = await reach(context, listener.address)
    link.send([b"hello"])
    peer, _ = await listener.receive()
    for index in range(50):
        listener.send(peer, [b"%d" % index])
    await asyncio.sleep(0.1)
    listener.close()
    got = [bytes((await link.receive())[0]) for _ in range(50)]
    assert got == [b"%d" % index for index in range(50)]
    for _ in range(2):
        with pytest.raises(StageUnreachableError, match="lost"):
            await asyncio.wait_for(link.receive(), 2)
    with pytest.raises(StageUnreachableError):
        link.send([b"more"])


async def test_sending_to_a_peer_that_left_is_no_error(context: zmq.asyncio.Context, listen: Listen) -> None:
    listener = listen()
    link = await reach(context, listener.address)
    link.send([b"hello"])
    peer, _ = await listener.receive()
    link.close()
    deadline = time.monotonic() + 10
    while listener.send(peer, [b"anyone?"]) and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    assert not listener.send(peer, [b"anyone?"])


@pytest.mark.parametrize("here", ["other", "none", "stage has none"])
async def test_a_key_that_does_not_match_is_a_clear_error_long_before_the_deadline(
    context: zmq.asyncio.Context, listen: Listen, here: str
) -> None:
    listener = listen(key=None if here == "stage has none" else ClusterKey.generate())
    started_s = time.monotonic()
    with pytest.raises(KeyMismatchError, match="key") as caught:
        await reach(context, listener.address, None if here == "none" else ClusterKey.generate())
    assert time.monotonic() - started_s < 8
    assert caught.value.fix is not None and "--key-file" in caught.value.fix


async def test_the_gatekeeper_refuses_a_stranger_who_knows_the_public_key(
    context: zmq.asyncio.Context, listen: Listen
) -> None:
    key, stranger = ClusterKey.generate(), ClusterKey.generate()
    listener = listen(key=key)
    outsider = context.socket(zmq.DEALER)
    outsider.linger = 0
    outsider.curve_serverkey = key.public
    outsider.curve_publickey, outsider.curve_secretkey = stranger.public, stranger.secret
    outsider.connect(listener.address.endpoint)
    await outsider.send(b"let me in")
    member = await reach(context, listener.address, key)
    member.send([b"member"])
    assert (await listener.receive())[1] == [b"member"]
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(listener.receive(), 0.3)
    member.close()
    outsider.close()


async def test_a_listener_survives_garbage_on_its_port(context: zmq.asyncio.Context, listen: Listen) -> None:
    listener = listen()
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(5000), b"\xff" + bytes(8) + b"\x7f" + os.urandom(500), b""):
        with socket.create_connection(("127.0.0.1", listener.address.port)) as stranger:
            stranger.sendall(garbage)
    link = await reach(context, listener.address)
    link.send([b"still there?"])
    # libzmq takes random bytes for a peer of ZMTP 1.0 now and then: the garbage itself may arrive first.
    async with asyncio.timeout(5):
        while (await listener.receive())[1] != [b"still there?"]:
            pass
    link.close()


async def test_nobody_listening_is_an_error_at_the_deadline(context: zmq.asyncio.Context) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        address = Address("127.0.0.1", reserved.getsockname()[1])
        with pytest.raises(StageUnreachableError, match="nothing listens there"):
            await reach(context, address, deadline_s=0.4)


async def test_a_port_of_something_else_is_an_error(context: zmq.asyncio.Context) -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
    with pytest.raises(StageUnreachableError, match="not an exo-kimi stage"):
        await reach(context, address)
    server.close()


async def test_a_stage_that_starts_late_is_reached(context: zmq.asyncio.Context, listen: Listen) -> None:
    first = listen()
    address = first.address
    first.close()
    await asyncio.sleep(0.05)
    waiting = asyncio.create_task(reach(context, address))
    await asyncio.sleep(0.2)
    listen(address)
    (await waiting).close()


async def test_another_machine_needs_a_key(context: zmq.asyncio.Context, listen: Listen) -> None:
    with pytest.raises(KeyMismatchError, match="needs the cluster key"):
        listen(Address("0.0.0.0", 0))
    with pytest.raises(KeyMismatchError, match="needs the cluster key"):
        await reach(context, Address("192.0.2.1", 5000))


async def test_a_port_in_use_is_named(listen: Listen) -> None:
    taken = listen().address
    with pytest.raises(AddressError, match=rf"127.0.0.1:{taken.port} is in use"):
        listen(taken)


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
async def test_an_address_of_another_machine_or_no_host_cannot_be_listened_on(listen: Listen, host: str) -> None:
    with pytest.raises(AddressError, match=r"cannot listen|no such host"):
        listen(Address(host, 5000), ClusterKey.generate())


async def test_a_host_without_address_is_an_error(context: zmq.asyncio.Context) -> None:
    with pytest.raises(AddressError, match="no such host"):
        await reach(context, Address("no-such-host.invalid", 5000), ClusterKey.generate())


@pytest.mark.parametrize(
    ("text", "printed", "loopback"),
    [
        ("127.0.0.1:5000", "127.0.0.1:5000", True),
        ("tcp://127.8.9.1:1", "127.8.9.1:1", True),
        ("localhost:80", "localhost:80", True),
        ("[::1]:65535", "[::1]:65535", True),
        ("studio.local:5000", "studio.local:5000", False),
        ("[fd00::20]:5000", "[fd00::20]:5000", False),
        ("10.0.0.5:5000", "10.0.0.5:5000", False),
        ("ipc:///tmp/x.sock", "ipc:///tmp/x.sock", True),
    ],
)
def test_addresses_are_read_and_judged(text: str, printed: str, loopback: bool) -> None:
    address = parse_address(text, option="--stage")
    assert (str(address), address.is_loopback) == (printed, loopback)


def link_local() -> str | None:
    """A link-local address of this machine with its interface; None where it has none."""
    table = Path("/proc/net/if_inet6")
    for line in table.read_text().splitlines() if table.exists() else []:
        digits, _, _, _, _, name = line.split()
        if digits.startswith("fe80"):
            return f"{ipaddress.IPv6Address(int(digits, 16))}%{name}"
    return None


def test_a_link_local_address_keeps_its_interface() -> None:
    address = parse_address("[fe80::1%lo]:5000", option="--stage")
    assert (address.host, str(address)) == ("fe80::1%lo", "[fe80::1%lo]:5000")
    assert parse_address(str(address), option="--stage") == address
    number = socket.if_nametoindex("lo")
    assert numeric_host(socket.getaddrinfo(address.host, 5000, type=socket.SOCK_STREAM)) == f"fe80::1%{number}"
    assert numeric_host(socket.getaddrinfo("::1", 5000, type=socket.SOCK_STREAM)) == "::1"
    with pytest.raises(AddressError, match=r"interface of a link-local address.*%en5"):
        parse_address("[fe80::1]:5000", option="--stage")


@pytest.mark.skipif(link_local() is None, reason="no link-local address here")
async def test_a_stage_at_a_link_local_address_is_reached(context: zmq.asyncio.Context, listen: Listen) -> None:
    key = ClusterKey.generate()
    listener = listen(Address(str(link_local()), 0), key)
    assert "%" in listener.address.host
    link = await reach(context, parse_address(str(listener.address), option="--stage"), key)
    link.send([b"hello"])
    assert (await listener.receive())[1] == [b"hello"]
    assert await read_mechanism(listener.address) == "CURVE"


NOT_ADDRESSES = """5000 :5000 host host: host:0 host:65536 host:-1 host:5e3 ::1:5000 [::1] [x]:1 udp://host:1 tcp:// *:5000
    0.0.0.0:5000 host:٥ ipc://relative""".split()


@pytest.mark.parametrize("text", ["", "ho st:1", "ipc:///" + "x" * 120, *NOT_ADDRESSES])
def test_a_bad_address_names_the_option(text: str) -> None:
    with pytest.raises(AddressError) as caught:
        parse_address(text, option="--stage")
    assert caught.value.where == "--stage"


@given(st.text())
def test_any_text_is_an_address_or_an_address_error(text: str) -> None:
    try:
        address = parse_address(text, option="--listen", listen=True)
    except AddressError:
        return
    assert address.path is not None or 0 <= address.port <= 65535


def test_a_key_file_is_private_and_never_replaced(tmp_path: Path) -> None:
    key, path = ClusterKey.generate(), tmp_path / "keys" / "cluster.key"
    key.write(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert find_key(key_file=path, environment_text="ignored") == key
    with pytest.raises(UsageError, match="cannot write"):
        key.write(path)
    path.chmod(0o644)
    with pytest.raises(UsageError, match="other users"):
        ClusterKey.read(path)
    assert key.secret.decode() not in repr(key)


@given(st.text(max_size=60))
def test_any_text_is_a_key_or_a_usage_error(text: str) -> None:
    try:
        key = ClusterKey.from_text(text, where="test")
    except UsageError:
        return
    assert len(key.public) == 40


def test_a_key_from_the_environment_is_read() -> None:
    key = ClusterKey.generate()
    assert find_key(key_file=None, environment_text=f" {key.secret.decode()}\n") == key
