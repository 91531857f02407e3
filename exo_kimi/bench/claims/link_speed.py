"""Latency and bandwidth of the network between two machines, for a [[link]] of cluster.toml.

    exo-kimi bench link-speed --listen 192.168.2.2:52600        on one machine
    exo-kimi bench link-speed 192.168.2.2:52600                 on the other

Plain TCP without delay, as stages talk. A byte there and back gives the latency one way; 64 MiB and an answer the bandwidth.
Nothing that is received is kept or looked at. It prints the two lines for cluster.toml and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence

from exo_kimi.errors import AddressError

PINGS, BLOCK_BYTES, BLOCKS = 200, 64 << 20, 5
MOST_BYTES = 256 << 20
DEADLINE_S = 30.0


def answer(listener: socket.socket) -> None:
    """Serve one peer until it leaves: each message is an 8-byte length and so many bytes, each answer one byte."""
    connection, _ = listener.accept()
    with connection:
        connection.settimeout(DEADLINE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while True:
            head = _receive(connection, 8)
            length = int.from_bytes(head, "big")
            if len(head) < 8 or length > MOST_BYTES or len(_receive(connection, length)) < length:
                return
            connection.sendall(b".")


def measure_link(host: str, port: int) -> dict[str, float]:
    """`latency_s` one way and `bandwidth_bytes_per_s` to a peer that runs `answer`; medians.

    Raises:
        AddressError: nobody answers there.
    """
    try:
        with socket.create_connection((host, port), timeout=DEADLINE_S) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            ping_s = statistics.median(_exchange(connection, b"\0") for _ in range(PINGS))
            block = bytes(BLOCK_BYTES)
            block_s = statistics.median(_exchange(connection, block) for _ in range(BLOCKS))
    except OSError as error:
        raise AddressError(
            "the other machine does not answer",
            found=error,
            where=f"{host}:{port}",
            fix="start `exo-kimi bench link-speed --listen HOST:PORT` there first",
        ) from None
    return {"latency_s": ping_s / 2, "bandwidth_bytes_per_s": BLOCK_BYTES / max(block_s - ping_s, 1e-9)}


def main(arguments: Sequence[str], *, announce: Callable[[str], None] = print) -> None:
    """Answer, or measure and print."""
    parser = argparse.ArgumentParser(prog="exo-kimi bench link-speed", description="latency and bandwidth of a link")
    parser.add_argument("address", nargs="?", metavar="HOST:PORT", help="a machine that listens")
    parser.add_argument("--listen", metavar="HOST:PORT", help="answer one peer")
    options = parser.parse_args(arguments)
    text = options.listen or options.address
    if text is None or (options.listen and options.address):
        parser.error("give either HOST:PORT or --listen HOST:PORT")
    host, _, port = text.rpartition(":")
    if options.listen:
        with socket.create_server((host, int(port))) as listener:
            announce(f"listening on {text}")
            answer(listener)
        return
    found = measure_link(host, int(port))
    announce(f"latency_s = {found['latency_s']:.3g}\nbandwidth_bytes_per_s = {found['bandwidth_bytes_per_s']:.4g}")
    announce(json.dumps({"bench": "link-speed", "address": text, **found}, sort_keys=True))


def _exchange(connection: socket.socket, message: bytes) -> float:
    start_s = time.perf_counter()
    connection.sendall(len(message).to_bytes(8, "big") + message)
    if _receive(connection, 1) != b".":
        raise ConnectionError("the peer left")
    return time.perf_counter() - start_s


def _receive(connection: socket.socket, length: int) -> bytes:
    """So many bytes, or fewer when the peer leaves; big messages are thrown away as they come."""
    received = bytearray()
    left = length
    while left:
        part = connection.recv(min(left, 1 << 20))
        if not part:
            return bytes(received)
        left -= len(part)
        received = received + part if length <= 8 else received
    return bytes(received) if length <= 8 else bytes(length)


if __name__ == "__main__":
    main(sys.argv[1:])
