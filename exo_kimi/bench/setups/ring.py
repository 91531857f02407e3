"""mlx-lm's pipeline as processes of this machine, on the ring of `mlx.distributed`.

The ranks are stopped (SIGSTOP) whenever they have nothing to do, because a rank that waits for another spins. A rank that
dies or hangs costs its deadline and is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from exo_kimi.errors import UsageError

START_S = 90.0
COMMAND = (sys.executable, "-m", "exo_kimi.bench.setups.ring_rank")


@dataclass(frozen=True, slots=True)
class RingProcess:
    """A rank with the pipes on which it takes orders and answers, and what it wrote to stderr."""

    process: subprocess.Popen[bytes]
    orders: IO[bytes]
    answers: IO[bytes]
    log: IO[bytes]

    @classmethod
    def started(cls, command: list[str], environment: dict[str, str]) -> RingProcess:
        """One that runs."""
        log = tempfile.TemporaryFile()  # noqa: SIM115  closed by `Ring.started`
        (taken, orders), (answers, given) = os.pipe(), os.pipe()
        try:
            process = subprocess.Popen(
                command, stdin=taken, stdout=given, stderr=log, env={**os.environ, **environment}
            )
        finally:
            os.close(taken)
            os.close(given)
        return cls(process, os.fdopen(orders, "wb"), os.fdopen(answers, "rb", buffering=0), log)

    def close(self) -> None:
        """Wait for its end; what was not yet written to it is dropped."""
        self.process.wait()
        for pipe in (self.orders, self.answers):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


class Ring:
    """Ranks that each take one JSON line at a time and answer with one. Made by `started`."""

    def __init__(self, ranks: list[RingProcess]) -> None:
        self._ranks = ranks
        self._read: defaultdict[int, bytes] = defaultdict(bytes)

    @classmethod
    @contextlib.contextmanager
    def started(cls, checkpoint: Path, *, ranks: int, command: tuple[str, ...] = COMMAND) -> Iterator[Ring]:
        """The ring with a checkpoint split evenly over its ranks; every process ends with the context.

        Args:
            checkpoint: a directory that mlx-lm can read.
            ranks: how many processes.
            command: starts a rank; the checkpoint is added.

        Raises:
            UsageError: a rank did not start.
        """
        with tempfile.TemporaryDirectory(prefix="ring-") as folder:
            hostfile = Path(folder) / "hosts.json"
            hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(ranks)]))
            processes: list[RingProcess] = []
            ring = cls(processes)
            try:
                for rank in range(ranks):
                    environment = {"MLX_HOSTFILE": str(hostfile), "MLX_RANK": str(rank), "HF_HUB_OFFLINE": "1"}
                    processes.append(RingProcess.started([*command, str(checkpoint)], environment))
                ring._answers(START_S)
                ring._signal(signal.SIGSTOP)
                yield ring
            finally:
                ring.kill()
                for each in processes:
                    each.log.close()

    def run(self, order: dict[str, Any], *, deadline_s: float) -> dict[str, Any]:
        """Give every rank the same order; the answer of rank 0, which has the tokens.

        Raises:
            UsageError: a rank died or did not answer in time; all of them are killed.
        """
        line = json.dumps(order).encode() + b"\n"
        self._signal(signal.SIGCONT)
        for rank in self._ranks:
            with contextlib.suppress(BrokenPipeError):  # its answer tells why
                rank.orders.write(line)
                rank.orders.flush()
        answer = self._answers(deadline_s)[0]
        self._signal(signal.SIGSTOP)
        return answer

    def kill(self) -> None:
        """End every rank, whatever it is doing."""
        for rank in self._ranks:
            rank.process.kill()  # also a stopped one
        for rank in self._ranks:
            rank.close()

    def _signal(self, number: signal.Signals) -> None:
        for rank in self._ranks:
            rank.process.send_signal(number)

    def _answers(self, deadline_s: float) -> list[dict[str, Any]]:
        until_s = time.monotonic() + deadline_s
        try:
            return [self._answer(rank, until_s) for rank in range(len(self._ranks))]
        except UsageError:
            self.kill()
            raise

    def _answer(self, rank: int, until_s: float) -> dict[str, Any]:
        pipe = self._ranks[rank].answers
        while b"\n" not in self._read[rank]:
            left_s = until_s - time.monotonic()
            if left_s <= 0 or not select.select([pipe], [], [], left_s)[0]:
                raise UsageError(f"rank {rank} of mlx-lm's ring does not answer", found=self._tail(rank))
            received = os.read(pipe.fileno(), 1 << 16)
            if not received:
                raise UsageError(f"rank {rank} of mlx-lm's ring died", found=self._tail(rank))
            self._read[rank] += received
        line, _, self._read[rank] = self._read[rank].partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _tail(self, rank: int) -> str:
        log = self._ranks[rank].log
        log.seek(0)
        return log.read().decode("utf-8", errors="replace")[-1000:].strip() or "nothing in its log"


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
