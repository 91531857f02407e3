"""Real exo nodes on loopback, for the benchmark `exo` and for tests: exo's own Python with a stand-in for its Rust networking.

exo is a checkout that EXO_SRC names, run by the Python that EXO_PYTHON names, which has exo's packages and, for our engine,
ours (or EXO_PYTHONPATH names a folder of them). The stand-in is in the folder that EXO_STANDIN names: `exo_rs.py` over
eclipse-zenoh, and `exo_node.py`, which starts a node that believes to be the machine NODE_IP. Linux only, where all of 127/8 is
loopback. It knows nothing of plans or models.
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

REPOSITORY = Path(__file__).parents[2]
STANDIN = REPOSITORY.parent / "shared" / "tools" / "exo_standin"
API_PORT, ZENOH_PORT, DISCOVERY_PORT = 52415, 52414, 52413
SEEN_S = 120.0
BIND_US = "from exo_kimi.plugin.exo_launch import bind\n\nassert bind() == (), bind()\n"
_ZENOH = ("--namespace", "lab", "--zenoh-port", str(ZENOH_PORT), "--discovery-port", str(DISCOVERY_PORT))
_numbers = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExoHere:
    """An exo that can be started.

    Args:
        source: the checkout.
        python: with exo's packages.
        standin: folder of the stand-in.
        paths: more folders to import from.
        arguments: of every node, beside those that all versions know.
    """

    source: Path
    python: Path
    standin: Path
    paths: Sequence[Path] = ()
    arguments: Sequence[str] = _ZENOH

    def cannot_import_us(self) -> str | None:
        """Why our engine cannot run in this Python; None when it can."""
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": _joined([REPOSITORY, *self.paths])}
        command = [str(self.python), "-c", "import zmq, llguidance, exo_kimi.plugin.exo_builder"]
        tried = subprocess.run(command, env=environment, capture_output=True, text=True)
        return None if tried.returncode == 0 else f"EXO_PYTHON cannot run exo-kimi: {tried.stderr.splitlines()[-1]}"


def find_exo(source: str = "EXO_SRC", python: str = "EXO_PYTHON") -> ExoHere | str:
    """The exo that variables of the environment name, or why there is none.

    Args:
        source: names the variable of the checkout.
        python: names the variable of its Python.
    """
    checkout, interpreter = os.environ.get(source), os.environ.get(python)
    if not checkout:
        return f"{source} does not name a checkout of exo"
    if not (Path(checkout) / "src" / "exo" / "main.py").exists():
        return f"{source}={checkout} is no checkout of exo"
    if not interpreter or not Path(interpreter).exists():
        return f"{python} does not name a Python 3.13 with exo's packages"
    standin = Path(os.environ.get("EXO_STANDIN") or STANDIN).resolve()
    if not (standin / "exo_node.py").exists():
        return f"EXO_STANDIN does not name a stand-in for exo's Rust module, and there is none in {standin}"
    extra = [Path(path) for path in os.environ.get("EXO_PYTHONPATH", "").split(":") if path]
    return ExoHere(source=Path(checkout).resolve(), python=Path(interpreter), standin=standin, paths=extra)


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

    def runner(self) -> int:
        """The youngest runner."""
        return max(pid for pid in self.children() if b"spawn_main" in _command(pid))

    def stop(self) -> None:
        """The node and whatever it started, which share its group; asked politely, exo says goodbye and stays."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
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
                start_new_session=True,
            )
        node = ExoNode(number=number, address=f"{self.network}.{number}", process=process, log=log)
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

    def _environment(self, number: int, home: Path, dashboard: Path) -> dict[str, str]:
        others = [f"tcp/{self.network}.{other}:{ZENOH_PORT}" for other in (1, 2) if other != number]
        plugin = {}
        if self.plugin:
            (self.root / "node_plugin.py").write_text(self.plugin)
            plugin["NODE_PLUGIN"] = "node_plugin"
        paths = [*self.paths, self.exo.standin, self.exo.source / "src", REPOSITORY, self.root, *self.exo.paths]
        return {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": _joined(paths),
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
    """Poll; a node that does not answer yet is not true."""
    deadline = time.monotonic() + within_s
    while True:
        with contextlib.suppress(httpx.TransportError, KeyError, ValueError):
            if true():
                return
        assert time.monotonic() < deadline, f"not true within {within_s} s\n{why()}"
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


def _joined(paths: Sequence[Path]) -> str:
    return ":".join(map(str, paths))


def _parents() -> dict[int, int]:
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    return {int(pid): int(parent) for pid, parent in (line.split() for line in listed.splitlines())}


def _command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""
