"""Real exo nodes on loopback: exo's own Python, from EXO_SRC, with the stand-in for its Rust networking."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

STANDIN = Path(
    os.environ.get("EXO_STANDIN") or Path(__file__).parents[2].parent / "shared" / "tools" / "exo_standin"
).resolve()
API_PORT, ZENOH_PORT, DISCOVERY_PORT = 52415, 52414, 52413
SEEN_S = 90.0
# All of 127/8 is loopback on Linux: two runs at once do not meet.
NETWORK = f"127.0.{os.getpid() % 250 + 1}"


def missing() -> str | None:
    """Why no real exo can be started here; None when it can."""
    source, python = os.environ.get("EXO_SRC"), os.environ.get("EXO_PYTHON")
    if not source:
        return "EXO_SRC does not name a checkout of exo"
    if not (Path(source) / "src" / "exo" / "main.py").exists():
        return f"EXO_SRC={source} is no checkout of exo"
    if not python or not Path(python).exists():
        return "EXO_PYTHON does not name a Python 3.13 with exo's packages"
    return None if (STANDIN / "exo_node.py").exists() else f"no stand-in for exo's Rust module in {STANDIN}"


@dataclass
class RealNode:
    """One node, at the address NUMBER of our loopback network."""

    number: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def url(self) -> str:
        return f"http://{NETWORK}.{self.number}:{API_PORT}"

    def children(self) -> list[int]:
        """Runners and the helper processes of multiprocessing."""
        return [pid for pid, parent in _parents().items() if parent == self.process.pid]

    def runner(self) -> int:
        """The youngest runner."""
        return max(pid for pid in self.children() if b"spawn_main" in _command(pid))

    def stop(self) -> None:
        """The node and whatever it started, which share its group; asked politely, exo says goodbye and stays."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)


@dataclass
class RealCluster:
    """Nodes that see each other. `models` is a read-only models directory of all of them."""

    root: Path
    models: Path
    nodes: list[RealNode] = field(default_factory=list)
    extra: Mapping[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return self.nodes[0].url

    def models_of(self, number: int) -> Path:
        """A read-only models directory of this node alone."""
        return self.root / f"models-of-node{number}"

    def start(self, number: int) -> RealNode:
        """Start a node; the first one would be master."""
        home = self.root / f"node{number}"
        dashboard = self.root / "dashboard"
        for directory in (home, dashboard, self.models_of(number)):
            directory.mkdir(parents=True, exist_ok=True)
        others = [f"tcp/{NETWORK}.{other}:{ZENOH_PORT}" for other in (1, 2) if other != number]
        source = Path(os.environ["EXO_SRC"]).resolve()
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{STANDIN}:{source / 'src'}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "HOME": str(home),
            "EXO_HOME": ".exo",
            "EXO_DASHBOARD_DIR": str(dashboard),
            "EXO_MODELS_READ_ONLY_DIRS": f"{self.models}:{self.models_of(number)}",
            "EXO_OFFLINE": "true",
            "HF_HUB_OFFLINE": "1",
            "OVERRIDE_MEMORY_MB": "4096",
            "OMP_NUM_THREADS": "1",
            "NODE_IP": f"{NETWORK}.{number}",
            "EXO_RS_LISTEN": f"{NETWORK}.{number}",
            "EXO_RS_CONNECT": ",".join(others),
            **self.extra,
        }
        command = [os.environ["EXO_PYTHON"], str(STANDIN / "exo_node.py"), "--offline", "--namespace", "lab"]
        command += [
            "--api-port",
            str(API_PORT),
            "--zenoh-port",
            str(ZENOH_PORT),
            "--discovery-port",
            str(DISCOVERY_PORT),
        ]
        log = self.root / f"node{number}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                command + (["-m"] if number == 1 else []),
                cwd=home,
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        node = RealNode(number=number, process=process, log=log)
        self.nodes = [*(other for other in self.nodes if other.number != number), node]
        self.nodes.sort(key=lambda each: each.number)
        return node

    def state(self) -> dict[str, Any]:
        raw: dict[str, Any] = httpx.get(f"{self.url}/state", timeout=30, trust_env=False).json()
        return raw

    def wait_seen(self) -> None:
        """Until every node has been measured and has reached every other."""
        count = len(self.nodes)

        def seen() -> bool:
            state = self.state()
            links = state["topology"]["connections"]
            pairs = sum(1 for sinks in links.values() for edges in sinks.values() if edges)
            return len(state["topology"]["nodes"]) == len(state["nodeMemory"]) == count and pairs == count * (count - 1)

        wait_until(seen, SEEN_S, self.tail)

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


def wait_until(true: Callable[[], bool], within_s: float, why: Callable[[], str] = str) -> None:
    """Poll; a node that does not answer yet is not true."""
    deadline = time.monotonic() + within_s
    while True:
        with contextlib.suppress(httpx.TransportError, KeyError, ValueError):
            if true():
                return
        assert time.monotonic() < deadline, f"not true within {within_s} s\n{why()}"
        time.sleep(0.5)


@contextlib.contextmanager
def cluster(
    root: Path, models: Path, *, nodes: int = 2, extra: Mapping[str, str] | None = None
) -> Iterator[RealCluster]:
    """Nodes for a while; nothing of them is left behind."""
    made = RealCluster(root=root, models=models, extra=extra or {})
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


def _command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""
