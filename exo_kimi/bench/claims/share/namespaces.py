"""Two network namespaces of this machine with a cable between them, as two machines are."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from exo_kimi.errors import MachineError

SHARE_PORT = 52510
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Namespace:
    """One end of the cable, as a machine with a home of its own."""

    name: str
    host: str
    home: Path
    cable: str

    def start(self, words: Sequence[str], **environment: str) -> subprocess.Popen[str]:
        """A command there; its output is one text."""
        variables = {**os.environ, "HOME": str(self.home), "PYTHONUNBUFFERED": "1", **environment}
        for name in ("EXO_KIMI_KEY", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
            if name not in environment:
                variables.pop(name, None)
        command = ["ip", "netns", "exec", self.name, *words]
        return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def plug(self, state: str) -> None:
        """`up` or `down`: this end of the cable."""
        subprocess.run(["ip", "-n", self.name, "link", "set", self.cable, state], check=True)

    def shape(self, rate: str | None) -> None:
        """What goes out of this end at a rate as `tc` writes it; None takes the bound away.

        Raises:
            MachineError: `tc` is not here, or cannot.
        """
        if rate is None:
            _run("tc", "-n", self.name, "qdisc", "del", "dev", self.cable, "root")
        else:
            shape = f"root tbf rate {rate} burst 256kb latency 50ms".split()
            _run("tc", "-n", self.name, "qdisc", "replace", "dev", self.cable, *shape)


@contextmanager
def two_namespaces(root: Path, *, rate: str | None = None) -> Iterator[tuple[Namespace, Namespace]]:
    """Make them, and take them away at the end.

    Args:
        root: of their homes.
        rate: of the cable as `tc` writes it, such as 160mbit; None is as fast as the machine.

    Raises:
        MachineError: this machine has none, or they need another user.
    """
    if not all(map(shutil.which, ("ip", "tc"))) or os.geteuid() != 0:
        raise MachineError("network namespaces need root, `ip` and `tc`", fix="run it on Linux as root")
    tag = f"k{os.getpid() % 100000}"
    ends = [
        Namespace(f"{tag}{which}", f"192.168.78.{number}", root / which, f"{tag}{which}v")
        for number, which in ((1, "a"), (2, "b"))
    ]
    one, other = ends
    try:
        for end in ends:
            end.home.mkdir(parents=True, exist_ok=True)
            _run("ip", "netns", "add", end.name)
        peer = f"type veth peer name {other.cable} netns {other.name}".split()
        _run("ip", "link", "add", one.cable, "netns", one.name, *peer)
        for end in ends:
            _run("ip", "-n", end.name, "addr", "add", f"{end.host}/24", "dev", end.cable)
            _run("ip", "-n", end.name, "link", "set", "lo", "up")
            _run("ip", "-n", end.name, "link", "set", end.cable, "up")
            if rate is not None:
                end.shape(rate)
        yield one, other
    finally:
        for end in ends:
            subprocess.run(["ip", "netns", "del", end.name], check=False, capture_output=True)


def _run(*command: str) -> None:
    found = subprocess.run(command, check=False, capture_output=True, text=True)
    if found.returncode:
        raise MachineError(
            "network namespaces cannot be made here", found=f"{' '.join(command[:4])}: {found.stderr.strip()}"
        )
