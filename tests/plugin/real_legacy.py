"""Real nodes of legacy exo on loopback: exo's own Python, from EXO_LEGACY_SRC, with exo-kimi beside it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
NODE_PORT, API_PORT = 50651, 52611
# All of 127/8 is loopback on Linux: two runs at once do not meet.
NETWORK = f"127.1.{os.getpid() % 250 + 1}"
_TOKENS = re.compile(r"Triggering all on_token callbacks with request_id='([^']*)' tokens=\[(\d+)\] is_finished=(\w+)")


def missing() -> str | None:
    """Why no legacy exo can be started here; None when it can."""
    source, python = os.environ.get("EXO_LEGACY_SRC"), os.environ.get("EXO_LEGACY_PYTHON")
    if not source:
        return "EXO_LEGACY_SRC does not name a checkout of exo v0.0.15-alpha"
    if not (Path(source) / "exo" / "main.py").exists():
        return f"EXO_LEGACY_SRC={source} is no checkout of legacy exo"
    if not python or not Path(python).exists():
        return "EXO_LEGACY_PYTHON does not name a Python 3.12 with the packages of legacy exo and of exo-kimi"
    return None


@dataclass
class LegacyNode:
    """One node, `node1` or `node2`."""

    number: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def url(self) -> str:
        return f"http://{NETWORK}.{self.number}:{API_PORT}"

    def text(self) -> str:
        """All that it printed."""
        return self.log.read_text(errors="replace")

    def said(self) -> list[str]:
        """What exo-kimi said in it."""
        return [line.removeprefix("exo-kimi: ") for line in self.text().splitlines() if line.startswith("exo-kimi: ")]

    def replies(self) -> dict[str, list[int]]:
        """Token ids of every request whose last layers are here."""
        found: dict[str, list[int]] = {}
        for request_id, token, _ in _TOKENS.findall(self.text()):
            found.setdefault(request_id, []).append(int(token))
        return found

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)


@dataclass
class LegacyCluster:
    """Nodes that know each other's address."""

    root: Path
    source: Path
    nodes: list[LegacyNode] = field(default_factory=list)

    def home(self, number: int) -> Path:
        """What is this node's alone: HOME, TMPDIR and EXO_HOME."""
        return self.root / f"node{number}"

    def start(
        self,
        number: int,
        before: Sequence[str],
        *,
        extra: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
        count: int = 2,
    ) -> LegacyNode:
        """Start a node; `before` stands between Python and exo's own arguments."""
        home = self.home(number)
        (home / "tmp").mkdir(parents=True, exist_ok=True)
        topology = self.root / f"topology{count}.json"
        topology.write_text(json.dumps({"peers": {f"node{each}": _peer(each) for each in range(1, count + 1)}}))
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{ROOT}:{self.source}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            "HOME": str(home),
            "TMPDIR": str(home / "tmp"),
            "EXO_HOME": str(home / "exo"),
            "HF_HUB_OFFLINE": "1",
            "CLANG": "1",
            "DEBUG": "2",
            "OMP_NUM_THREADS": "1",
            **(extra or {}),
        }
        own = ["--inference-engine", "mlx", "--disable-tui", "--node-id", f"node{number}"]
        own += ["--node-host", f"{NETWORK}.{number}", "--node-port", str(NODE_PORT)]
        own += ["--discovery-module", "manual", "--discovery-config-path", str(topology)]
        own += ["--chatgpt-api-port", str(API_PORT), "--max-generate-tokens", "16", "--default-temp", "0"]
        log = self.root / f"node{number}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                [os.environ["EXO_LEGACY_PYTHON"], *before, *own, *arguments],
                cwd=home,
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        node = LegacyNode(number=number, process=process, log=log)
        self.nodes = [*(other for other in self.nodes if other.number != number), node]
        self.nodes.sort(key=lambda each: each.number)
        return node

    def wait_seen(self, count: int = 2, within_s: float = 90.0) -> None:
        """Until every node's topology holds this many nodes."""

        def seen() -> bool:
            return all(
                len(httpx.get(f"{node.url}/topology", timeout=10, trust_env=False).json()["nodes"]) == count
                for node in self.nodes
            )

        wait_until(seen, within_s, self.tail)

    def ask(self, number: int, prompt: str, *, model: str, stream: bool = False) -> httpx.Response:
        """A chat at a node's API."""
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], "stream": stream}
        node = next(node for node in self.nodes if node.number == number)
        return httpx.post(f"{node.url}/v1/chat/completions", json=body, timeout=120, trust_env=False)

    def tail(self) -> str:
        """The last lines of every log, for a failing test."""
        return "\n".join(f"--- {node.log.name}\n{node.text()[-3000:]}" for node in self.nodes)

    def stop(self) -> None:
        for node in self.nodes:
            node.stop()


def _peer(number: int) -> dict[str, Any]:
    flops = {"fp32": 1.0, "fp16": 1.0, "int8": 1.0}
    # The second has more memory: exo alone would give it the first layers.
    capabilities = {"model": "Linux", "chip": "CPU", "memory": 1000 * number, "flops": flops}
    return {"address": f"{NETWORK}.{number}", "port": NODE_PORT, "device_capabilities": capabilities}


def wait_until(true: Callable[[], bool], within_s: float, why: Callable[[], str] = str) -> None:
    """Poll; a node that does not answer yet is not true."""
    deadline = time.monotonic() + within_s
    while True:
        with contextlib.suppress(httpx.TransportError, KeyError, ValueError):
            if true():
                return
        assert time.monotonic() < deadline, f"not true within {within_s} s\n{why()}"
        time.sleep(0.3)


@contextlib.contextmanager
def cluster(root: Path, source: Path | None = None) -> Iterator[LegacyCluster]:
    """A place for nodes; nothing of them is left behind."""
    made = LegacyCluster(root=root, source=source or Path(os.environ["EXO_LEGACY_SRC"]).resolve())
    try:
        yield made
    finally:
        made.stop()
