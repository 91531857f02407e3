"""Pulls in forked processes that can be killed, with the payload that their clients read counted in a file that they share.

For each line on its standard input one pull is forked: its process id is printed, then its exit status.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from exo_kimi.fetch.hub import HubSource
from exo_kimi.fetch.pull import PullOptions, pull
from exo_kimi.fetch.source import RemoteFile


def main(url: str, here: str, counter: str, connections: str) -> None:
    with Path(counter).open("r+b") as stream:
        shared = mmap.mmap(stream.fileno(), 8)
    read, lock = HubSource.read, threading.Lock()

    def counted(self: HubSource, file: RemoteFile, start: int, end: int) -> Iterator[bytes]:
        for piece in read(self, file, start, end):
            with lock:
                shared[:8] = (int.from_bytes(shared[:8], "little") + len(piece)).to_bytes(8, "little")
            yield piece

    HubSource.read = counted
    options = PullOptions(layers=(3, 7), connections=int(connections))
    for _ in sys.stdin:
        child = os.fork()
        if not child:
            pull(HubSource("org/kimi", endpoint=url), Path(here), options)
            os._exit(0)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
