"""Two network namespaces of this machine with a cable between them, as two machines are."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest


@dataclass
class Machine:
    """One namespace, with a home of its own."""

    name: str
    host: str
    home: Path
    cable: str

    def start(self, words: Sequence[str], **environment: str) -> subprocess.Popen[str]:
        """A command there; its output is one text."""
        command = ["ip", "netns", "exec", self.name, *words]
        variables = {**os.environ, "HOME": str(self.home), "PYTHONUNBUFFERED": "1", **environment}
        for name in ("EXO_KIMI_KEY", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
            if name not in environment:
                variables.pop(name, None)
        return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def plug(self, state: str) -> None:
        """`up` or `down`: this end of the cable."""
        subprocess.run(["ip", "-n", self.name, "link", "set", self.cable, state], check=True)


@dataclass
class TwoMachines:
    """Both ends of the cable."""

    one: Machine
    other: Machine
    started: list[subprocess.Popen[str]] = field(default_factory=list)


@contextmanager
def two_machines(root: Path, *, rate: str | None = None) -> Iterator[TwoMachines]:
    """Make them, with the cable's rate as `tc` writes it; skipped where a test may not."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and `ip`")
    tag = f"k{os.getpid() % 100000}"
    ends = [
        Machine(f"{tag}{which}", f"192.168.78.{number}", root / which, f"{tag}{which}v")
        for number, which in ((1, "a"), (2, "b"))
    ]
    try:
        for end in ends:
            end.home.mkdir(parents=True, exist_ok=True)
            _run_or_skip("ip", "netns", "add", end.name)
        one, other = ends
        peer = f"type veth peer name {other.cable} netns {other.name}".split()
        _run_or_skip("ip", "link", "add", one.cable, "netns", one.name, *peer)
        for end in ends:
            _run_or_skip("ip", "-n", end.name, "addr", "add", f"{end.host}/24", "dev", end.cable)
            _run_or_skip("ip", "-n", end.name, "link", "set", "lo", "up")
            _run_or_skip("ip", "-n", end.name, "link", "set", end.cable, "up")
            if rate is not None:
                shape = f"root tbf rate {rate} burst 64kb latency 200ms".split()
                _run_or_skip("tc", "-n", end.name, "qdisc", "add", "dev", end.cable, *shape)
        yield TwoMachines(one, other)
    finally:
        for end in ends:
            subprocess.run(["ip", "netns", "del", end.name], check=False, capture_output=True)


def _run_or_skip(*command: str) -> None:
    found = subprocess.run(command, check=False, capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"{' '.join(command[:4])}: {found.stderr.strip()}")
