"""A process that carries bytes over `mx.distributed` for a stage: `python -m exo_kimi.runtime.pairs.link_helper`.

A process of its own, because what is stuck in MLX's communication cannot be ended otherwise, and because a group cannot be made
twice in one process. It is killed and started anew while the stage keeps its weights. Every operation is evaluated by itself, on
the CPU's stream.

    stage -> helper   rank 0: 8 bytes length, data     rank 1: 8 bytes length
    helper -> stage   one JSON line when the group is made; then rank 0: 1 byte when it is sent, rank 1: the data
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import mlx.core as mx
import numpy as np

from exo_kimi.runtime.pairs.pairing import LENGTH_BYTES, Pair

SENT = b"+"


def main(argv: Sequence[str] | None = None) -> int:
    """Carry until the stage closes its end."""
    parser = argparse.ArgumentParser(prog="exo_kimi.runtime.pairs.link_helper", description="carries bytes for a stage")
    parser.add_argument("--pair", required=True, help="the pair, as JSON")
    parser.add_argument("--rank", required=True, type=int, help="0 sends, 1 receives")
    parser.add_argument("--fd", required=True, type=int, help="socket to the stage")
    parser.add_argument("--deadline", required=True, type=int, help="seconds in which the group must be made")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole terminal
    tie = socket.socket(fileno=options.fd)
    pair = Pair(**json.loads(options.pair))
    try:
        group = _make(pair, options.rank, deadline_s=options.deadline)
    except Exception as error:  # noqa: BLE001  the process's edge: it is told and ends
        tie.sendall(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode() + b"\n")
        return 1
    orders: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_listen, args=(tie, orders, options.rank), name="link-helper-orders", daemon=True).start()
    tie.sendall(b'{"error": null}\n')
    try:
        (_send if options.rank == 0 else _receive)(tie, orders, group)
    except (RuntimeError, OSError) as error:  # the peer is gone, or the stage is
        print(f"the {pair.backend} link ended: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # what is pending in MLX would be waited for
    return 0


def _make(pair: Pair, rank: int, *, deadline_s: int) -> Any:
    # `init` waits for ever and holds the interpreter: only the kernel can end it.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(deadline_s)
    mx.set_default_device(mx.Device(mx.cpu))
    with tempfile.TemporaryDirectory(prefix="exo-kimi-link-") as folder:
        for name, text in pair.files().items():
            (Path(folder) / name).write_text(text)
        os.environ.update(pair.environment(rank, Path(folder)))
        group = mx.distributed.init(strict=True, backend=pair.backend)
    signal.alarm(0)
    if (group.rank(), group.size()) != (rank, 2):
        raise RuntimeError(f"rank {group.rank()} of {group.size()}, not {rank} of 2")
    return group


def _listen(tie: socket.socket, orders: SimpleQueue[Any], rank: int) -> None:
    """Take orders also while MLX is stuck; when the stage is gone, so is this process."""
    stream = tie.makefile("rb")
    while len(head := stream.read(LENGTH_BYTES)) == LENGTH_BYTES:
        length = int.from_bytes(head, "little")
        orders.put(length if rank else stream.read(length))
    os._exit(0)


def _send(tie: socket.socket, orders: SimpleQueue[Any], group: Any) -> None:
    while True:
        data = mx.array(np.frombuffer(orders.get(), np.uint8))
        mx.eval(mx.distributed.send(data, 1, group=group))
        tie.sendall(SENT)


def _receive(tie: socket.socket, orders: SimpleQueue[Any], group: Any) -> None:
    while True:
        data: Any = mx.distributed.recv((orders.get(),), mx.uint8, 0, group=group)
        mx.eval(data)
        tie.sendall(memoryview(data))


if __name__ == "__main__":
    sys.exit(main())
