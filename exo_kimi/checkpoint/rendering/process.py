"""The process in which templates are rendered: one after the other, each within limits that the kernel holds."""

from __future__ import annotations

import os
import resource
import signal
import sys
from typing import BinaryIO

from exo_kimi.checkpoint.rendering.environment import render
from exo_kimi.checkpoint.rendering.messages import (
    LENGTH_BYTES,
    RenderFailure,
    RenderRequest,
    pack_failure,
    pack_text,
)


def main() -> None:
    """Answer requests from stdin on stdout until stdin ends, which it does with the parent."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    base_bytes = _address_space_bytes()
    while (data := _read(requests)) is not None:
        answer = _answer(RenderRequest.unpack(data), base_bytes)
        del data
        answers.write(len(answer).to_bytes(LENGTH_BYTES, "little") + answer)
        answers.flush()


def _answer(request: RenderRequest, base_bytes: int) -> bytes:
    try:
        # Nobody catches the timer's signal: it ends the process in the middle of whatever C code computes.
        signal.setitimer(signal.ITIMER_PROF, request.cpu_s)
        _limit_address_space(base_bytes + request.memory_bytes if base_bytes else None)
        try:
            return pack_text(render(request.source, request.variables))
        except MemoryError:
            return pack_failure(RenderFailure("limit", "it takes too much memory"))
        except RenderFailure as failure:
            return pack_failure(failure)
    finally:
        _limit_address_space(None)
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit_address_space(size_bytes: int | None) -> None:
    """Sets the soft limit; None lifts it as far as the hard one allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if size_bytes is None or (hard != resource.RLIM_INFINITY and size_bytes > hard):
        size_bytes = hard
    resource.setrlimit(resource.RLIMIT_AS, (size_bytes, hard))


def _address_space_bytes() -> int:
    """Of this process now; 0 where /proc does not tell, as on macOS, whose kernel holds no limit of it either (see `pool`)."""
    try:
        descriptor = os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:
        return 0
    with os.fdopen(descriptor) as stream:
        return int(stream.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _read(stream: BinaryIO) -> bytes | None:
    head = stream.read(LENGTH_BYTES)
    length = int.from_bytes(head, "little")
    data = stream.read(length) if len(head) == LENGTH_BYTES else b""
    return data if data and len(data) == length else None


if __name__ == "__main__":
    main()
