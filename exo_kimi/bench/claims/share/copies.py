"""One side of one copy, as a process of a namespace: `give`, `take` or `pull`. A line of JSON says what it took.

    python -m exo_kimi.bench.claims.share.copies give DIR HOST
    python -m exo_kimi.bench.claims.share.copies take|take-unsynced DIR HOST
    python -m exo_kimi.bench.claims.share.copies pull DIR HOST

`give` and `take` are the plain copy: one connection, 1 MiB at a time, from a file into a file that is on the disk at the end, or
unsynced in the page cache. Neither encrypts nor verifies.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from exo_kimi.bench.claims.share.namespaces import BLOCK_BYTES, SHARE_PORT

PLAIN_PORT = 52511


def give(directory: Path, host: str) -> None:
    """Send every weight file to one that connects."""
    with socket.create_server((host, PLAIN_PORT)) as listener:
        print("listening", flush=True)
        connection, _ = listener.accept()
        buffer = memoryview(bytearray(BLOCK_BYTES))
        with connection:
            for path in sorted(directory.glob("*.safetensors")):
                connection.sendall(path.stat().st_size.to_bytes(8, "little"))
                with path.open("rb", buffering=0) as stream:
                    while count := stream.readinto(buffer):
                        connection.sendall(buffer[:count])


def take(directory: Path, host: str, *, sync: bool = True) -> None:
    """Receive the files of `give`."""
    directory.mkdir()
    buffer = memoryview(bytearray(BLOCK_BYTES))
    with socket.create_connection((host, PLAIN_PORT)) as connection:
        number = 0
        while head := connection.recv(8, socket.MSG_WAITALL):
            number += 1
            left = int.from_bytes(head, "little")
            with (directory / str(number)).open("wb", buffering=0) as stream:
                while left:
                    count = connection.recv_into(buffer[: min(left, BLOCK_BYTES)])
                    stream.write(buffer[:count])
                    left -= count
                if sync:
                    os.fsync(stream.fileno())  # as ours does


def fetch(directory: Path, host: str) -> None:
    """What `exo-kimi pull --from` does."""
    from exo_kimi.fetch.peer import ShareSource
    from exo_kimi.fetch.pull import PullOptions, pull
    from exo_kimi.runtime.transport.address import Address
    from exo_kimi.runtime.transport.keys import ENVIRONMENT_NAME, find_key

    key = find_key(key_file=None, environment_text=os.environ[ENVIRONMENT_NAME])
    pull(ShareSource(Address(host, SHARE_PORT), key=key), directory, PullOptions())


def main(what: str, directory: str, host: str) -> None:
    """One side, timed without the start of its interpreter."""
    if what == "pull":
        import exo_kimi.fetch.peer
        import exo_kimi.fetch.pull  # noqa: F401  before the clock starts
    copies: dict[str, Callable[[Path, str], None]] = {
        "give": give,
        "take": take,
        "take-unsynced": partial(take, sync=False),
        "pull": fetch,
    }
    start_s, before_s = time.perf_counter(), _processor_s()
    copies[what](Path(directory), host)
    took_s, processor_s = time.perf_counter() - start_s, _processor_s() - before_s
    print(json.dumps({"took_s": took_s, "processor_s": processor_s}), flush=True)


def _processor_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main(*sys.argv[1:])
