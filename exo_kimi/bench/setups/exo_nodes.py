"""Real exo nodes on loopback, for the benchmark `exo` and for tests: exo's own Python with a stand-in for its Rust networking.

Linux only, where all of 127/8 is loopback. What is started says `exo_here`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from exo_kimi.bench.setups.exo_here import REPOSITORY, ZENOH_PORT, ExoHere
from exo_kimi.errors import ExoError

API_PORT = 52415
START_S, SEEN_S, TRIES = 90.0, 60.0, 3
BIND_US = "from exo_kimi.plugin.runner.launch import bind\n\nassert bind() == (), bind()\n"
_numbers = itertools.count()


@dataclass
class ExoNode:
    """One node, and the address that it has."""

    number: int
    address: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def url(self) -> str:
        return f"http://{self.address}:{API_PORT}"

    def children(self) -> list[int]:
        """Runners and the helper processes of multiprocessing."""
        return [pid for pid, parent in _parents().items() if parent == self.process.pid]

    def runners(self) -> list[int]:
        """The processes that hold models."""
        return [pid for pid in self.children() if b"spawn_main" in _command(pid)]

    def runner(self) -> int:
        """The youngest runner."""
        return max(self.runners())

    def stop(self) -> None:
        """The node and whatever it started; asked politely, exo says goodbye and stays. They are in the group of whoever started
        them, so that they end with it when it is killed."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGSTOP)  # it starts nothing more
        for pid in (self.process.pid, *_descendants(self.process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(10)


@dataclass
class ExoCluster:
    """Nodes that see each other.

    Args:
        exo: what is started.
        root: folder for homes and logs.
        models: a read-only models directory of all nodes.
        extra: more variables of every node's environment.
        paths: more folders to import from, before exo's own.
        plugin: Python text that is run first in every node and runner.
    """

    exo: ExoHere
    root: Path
    models: Path
    extra: Mapping[str, str] = field(default_factory=dict)
    paths: Sequence[Path] = ()
    plugin: str = ""
    nodes: list[ExoNode] = field(default_factory=list)
    # Two runs at once do not meet, nor two clusters of one run.
    network: str = field(default_factory=lambda: f"127.{next(_numbers) % 250}.{os.getpid() % 250 + 1}")

    @property
    def url(self) -> str:
        return self.nodes[0].url

    def models_of(self, number: int) -> Path:
        """A read-only models directory of this node alone."""
        return self.root / f"models-of-node{number}"

    def start(self, number: int) -> ExoNode:
        """Start a node; the first one would be master."""
        home = self.root / f"node{number}"
        dashboard = self.root / "dashboard"
        for directory in (home, dashboard, self.models_of(number)):
            directory.mkdir(parents=True, exist_ok=True)
        command = [str(self.exo.python), str(self.exo.standin / "exo_node.py"), "--offline", *self.exo.arguments]
        command += ["--api-port", str(API_PORT)] + (["-m"] if number == 1 else [])
        log = self.root / f"node{number}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                cwd=home,
                env=self._environment(number, home, dashboard),
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
            )
        node = ExoNode(number=number, address=f"{self.network}.{number}", process=process, log=log)
        self.nodes = [*(other for other in self.nodes if other.number != number), node]
        self.nodes.sort(key=lambda each: each.number)
        return node

    def state(self) -> dict[str, Any]:
        raw: dict[str, Any] = httpx.get(f"{self.url}/state", timeout=30, trust_env=False).json()
        return raw

    def wait_seen(self) -> None:
        """Until every node has been measured and has reached every other.

        On a busy machine two nodes may each take itself for the master and stay so; then the later ones are started again.

        Raises:
            ExoError: they do not come together.
        """
        count = len(self.nodes)

        def seen() -> bool:
            state = self.state()
            links = state["topology"]["connections"]
            pairs = sum(1 for sinks in links.values() for edges in sinks.values() if edges)
            return len(state["topology"]["nodes"]) == len(state["nodeMemory"]) == count and pairs == count * (count - 1)

        wait_until(lambda: bool(self.state()), START_S, self.tail)
        for _ in range(TRIES - 1):
            with contextlib.suppress(ExoError):
                return wait_until(seen, SEEN_S, self.tail)
            for node in self.nodes[1:]:
                node.stop()
                self.start(node.number)
        return wait_until(seen, START_S + SEEN_S, self.tail)

    def events(self) -> list[dict[str, Any]]:
        """All events of the cluster so far."""
        found: list[dict[str, Any]] = httpx.get(f"{self.url}/events", timeout=60, trust_env=False).json()
        return found

    def tail(self) -> str:
        """The last lines of every log, for a failing test."""
        return "\n".join(f"--- {node.log.name}\n{node.log.read_text(errors='replace')[-2000:]}" for node in self.nodes)

    def stop(self) -> None:
        for node in self.nodes:
            node.stop()

    def _environment(self, number: int, home: Path, dashboard: Path) -> dict[str, str]:
        others = [f"tcp/{self.network}.{other}:{ZENOH_PORT}" for other in (1, 2) if other != number]
        plugin = {}
        if self.plugin:
            (self.root / "node_plugin.py").write_text(self.plugin)
            plugin["NODE_PLUGIN"] = "node_plugin"
        paths = [*self.paths, self.exo.standin, self.exo.source / "src", REPOSITORY, self.root, *self.exo.paths]
        return {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": ":".join(map(str, paths)),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HOME": str(home),
            "EXO_HOME": ".exo",
            "EXO_DASHBOARD_DIR": str(dashboard),
            "EXO_MODELS_READ_ONLY_DIRS": f"{self.models}:{self.models_of(number)}",
            "EXO_OFFLINE": "true",
            "HF_HUB_OFFLINE": "1",
            "OVERRIDE_MEMORY_MB": "4096",
            "OMP_NUM_THREADS": "1",
            "NODE_IP": f"{self.network}.{number}",
            "EXO_RS_LISTEN": f"{self.network}.{number}",
            "EXO_RS_CONNECT": ",".join(others),
            **plugin,
            **self.extra,
        }


def wait_until(true: Callable[[], bool], within_s: float, why: Callable[[], str] = str) -> None:
    """Poll; a node that does not answer yet is not true.

    Raises:
        ExoError: it did not become true.
    """
    deadline = time.monotonic() + within_s
    while True:
        with contextlib.suppress(httpx.TransportError, KeyError, ValueError):
            if true():
                return
        if time.monotonic() > deadline:
            raise ExoError(f"exo's nodes did not get so far within {within_s:g} s", found=why())
        time.sleep(0.5)


@contextlib.contextmanager
def exo_cluster(exo: ExoHere, root: Path, models: Path, *, nodes: int = 2, **options: Any) -> Iterator[ExoCluster]:
    """Nodes for a while, with the options of `ExoCluster`; nothing of them is left behind."""
    root.mkdir(parents=True, exist_ok=True)
    made = ExoCluster(exo=exo, root=root, models=models, **options)
    try:
        for number in range(1, nodes + 1):
            made.start(number)
        made.wait_seen()
        yield made
    finally:
        made.stop()


def _parents() -> dict[int, int]:
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    return {int(pid): int(parent) for pid, parent in (line.split() for line in listed.splitlines())}


def _descendants(pid: int) -> list[int]:
    parents = _parents()
    found = [pid]
    for each in found:  # which grows meanwhile
        found += [child for child, parent in parents.items() if parent == each]
    return found[1:]


def _command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""
