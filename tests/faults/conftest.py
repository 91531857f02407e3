"""A server under the fault injector: started, asked and judged; the n-th call of a kind fails in it or in its stages."""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest

from exo_kimi.checkpoint.tiny.make import make_tiny

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("injector.c")
KINDS = ("descriptor", "process", "write", "send", "map", "allocation")
SCOPES = {"server": 1, "stages": 2}
Kind = Literal["descriptor", "process", "write", "send", "map", "allocation"]
Scope = Literal["server", "stages"]
ENDLESS = 2**40
UP_S, ANSWER_S, END_S = 40.0, 40.0, 8.0
NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
# Everything is imported once; each server is a fork of this process that begins at its own first line.
NURSERY = """
import ctypes, json, os, signal, sys
import exo_kimi.cli.app, exo_kimi.serve.launch
from exo_kimi.cli import main
from exo_kimi.serve import loop_watch

loop_watch.STUCK_S = 12.0  # nobody waits a minute for each of a hundred servers
ready = ctypes.CDLL(os.environ["LD_PRELOAD"]).faults_ready
print("ready", flush=True)
servers = []
for line in sys.stdin:
    order = json.loads(line)
    if "poll" in order:
        pid, status = os.waitpid(order["poll"], os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        os.setsid()
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        ready()
        status = 70
        try:
            status = main(order["words"])
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                try:
                    stream.flush()
                except OSError:
                    pass
            os._exit(status)
    servers.append(pid)
    print(json.dumps(pid), flush=True)
for pid in servers:  # the tests are gone
    try:
        os.killpg(pid, signal.SIGKILL)
    except OSError:
        pass
"""


class Control(ctypes.Structure):
    """As `struct control` of injector.c."""

    _fields_ = [
        ("kind", ctypes.c_int),
        ("scope", ctypes.c_int),
        ("before", ctypes.c_long),
        ("failing", ctypes.c_long),
        ("calls", ctypes.c_long),
        ("failed", ctypes.c_long),
    ]


@dataclass
class Tally:
    """What came of every call that failed, of one kind in one phase."""

    phase: str
    kind: str
    scope: str
    calls: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)

    def row(self) -> str:
        ends = ", ".join(f"{count} {end}" for end, count in sorted(self.ends.items()))
        return f"| {self.phase} | {self.kind} | {self.scope} | {self.calls} | {ends} | {len(self.bad)} |"


def client(url: httpx.URL | str) -> httpx.Client:
    """One that reads no certificates, which takes longer than an answer."""
    return httpx.Client(base_url=url, timeout=ANSWER_S, trust_env=False, verify=NO_CERTIFICATES)


class Journal:
    """What came of each case, kept in a file, so that a sweep that was ended goes on where it was.

    Args:
        path: a line for each case; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._ends: dict[tuple[str, str, str, int], str] = {}
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                phase, kind, scope, n, end = json.loads(line)
                self._ends[phase, kind, scope, n] = end

    def end_of(self, tally: Tally, n: int) -> str | None:
        """How a case ended that needs no second run; empty when no n-th call was made."""
        return self._ends.get((tally.phase, tally.kind, tally.scope, n))

    def add(self, tally: Tally, n: int, end: str) -> None:
        """Write that a case was not bad."""
        if self._path is not None:
            with self._path.open("a") as stream:
                stream.write(json.dumps([tally.phase, tally.kind, tally.scope, n, end]) + "\n")


class Server:
    """A running `exo-kimi serve`."""

    def __init__(self, faults: Faults, log: Path, words: list[str]) -> None:
        self._faults = faults
        self.log = log
        self.status: int | None = None
        self.pid: int = faults.order({"words": words, "log": str(log)})
        self._http: httpx.Client | None = None

    @property
    def alive(self) -> bool:
        if self.status is None:
            self.status = self._faults.order({"poll": self.pid})
        return self.status is None

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def http(self) -> httpx.Client | None:
        """A client, once the server listens; it may listen before it could say so."""
        if self._http is None and (found := re.search(r"serving at ([^\s,]+)", self.text())):
            self._http = client(found[1])
        return self._http

    def health(self) -> dict[str, Any]:
        http = self.http()
        if http is None:
            return {}
        try:
            report: dict[str, Any] = http.get("/health", timeout=5).json()
            return report
        except (httpx.HTTPError, ValueError):
            return {}

    def wait_up(self, within_s: float = UP_S, *, look_s: float = 0.05) -> bool:
        """Whether all its stages are ready in time; False when it ended or is not."""
        until_s = time.monotonic() + within_s
        while time.monotonic() < until_s and self.alive:
            if self.health().get("status") == "ok":
                return True
            time.sleep(look_s)
        return False

    def pids(self) -> list[int]:
        return [stage["pid"] for stage in self.health().get("stages", []) if stage.get("pid")]

    def ask(self, text: str = "hi", *, stream: bool = False, max_tokens: int = 8) -> tuple[str, str]:
        """`right` with the text, `told` with the error, or `lost` with what was seen instead."""
        body = {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": stream,
        }
        http = self.http()
        if http is None:
            return "told", "not listening"
        try:
            with (
                client(http.base_url) as asking,
                asking.stream("POST", "/v1/chat/completions", json=body) as answer,
            ):
                until_s = time.monotonic() + ANSWER_S
                content = b""
                for part in answer.iter_bytes():
                    content += part
                    if time.monotonic() > until_s:
                        return "lost", f"no end: {content[-300:]!r}"
        except httpx.TimeoutException as error:
            return "lost", f"no answer: {error!r}"
        except httpx.HTTPError as error:
            return "told", repr(error)
        if answer.status_code != 200:
            return "told", f"{answer.status_code} {content[:300]!r}"
        if stream:
            return _streamed(content.decode())
        return "right", json.loads(content)["choices"][0]["message"]["content"]

    def signal(self, number: int) -> None:
        if self.alive:
            os.kill(self.pid, number)

    def wait_end(self, within_s: float = END_S) -> bool:
        until_s = time.monotonic() + within_s
        while self.alive:
            if time.monotonic() > until_s:
                return False
            time.sleep(0.02)
        return True

    def kill(self) -> None:
        if self.alive:
            os.killpg(self.pid, signal.SIGKILL)
            self.wait_end()
        if self._http is not None:
            self._http.close()

    def how_it_ended(self, *, wanted: tuple[int, ...] = (1,)) -> str:
        """In a word; `bad` when nobody could tell from its last line why."""
        lines = [line for line in self.text().splitlines() if line.strip()]
        last = lines[-1] if lines else ""
        if self.status is not None and self.status < 0:
            return f"ended by {signal.Signals(-self.status).name}"
        if "Traceback" in self.text() or not last or self.status not in wanted:
            return "bad end"
        return "ended with a line"


def _streamed(text: str) -> tuple[str, str]:
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    said, ended = "", False
    for event in events:
        if event == "[DONE]":
            continue
        chunk = json.loads(event)
        if "error" in chunk:
            return "told", str(chunk["error"]["code"])
        for choice in chunk["choices"]:
            said += choice["delta"].get("content") or ""
            ended = ended or choice["finish_reason"] is not None
    return ("right", said) if ended and events[-1] == "[DONE]" else ("told", "the stream broke off")


@dataclass
class Case:
    """What came of one run of a phase.

    Args:
        server: that ran it.
        failed: calls that failed.
        outcomes: of its requests.
        judge: says how the server is then.
        alone: whether the server was there for this run only.
    """

    server: Server
    failed: int
    outcomes: list[tuple[str, str]]
    judge: Callable[[str, Tally], str | None]
    alone: bool


class Faults:
    """The injector, and servers under it.

    Args:
        folder: for the library, the control file and logs.
        model: checkpoint that is served.
    """

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        library = folder / "injector.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"], check=True)
        path = folder / "control"
        path.write_bytes(bytes(ctypes.sizeof(Control)))
        self._file = path.open("r+b")
        self.control = Control.from_buffer(mmap.mmap(self._file.fileno(), ctypes.sizeof(Control)))
        self._log = (folder / "nursery.log").open("w")
        self._nursery = subprocess.Popen(
            [sys.executable, "-c", NURSERY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "LD_PRELOAD": str(library),
                "EXO_KIMI_FAULTS": str(path),
                "OPENBLAS_NUM_THREADS": "1",
                "HOME": str(folder),
            },
        )
        self._lock = threading.Lock()
        self._count = 0
        assert self._nursery.stdout is not None
        assert self._nursery.stdout.readline() == "ready\n", (folder / "nursery.log").read_text()

    def order(self, order: dict[str, Any]) -> Any:
        with self._lock:
            assert self._nursery.stdin is not None and self._nursery.stdout is not None
            self._nursery.stdin.write(json.dumps(order) + "\n")
            self._nursery.stdin.flush()
            return json.loads(self._nursery.stdout.readline())

    def start(self, *options: str) -> Server:
        self._count += 1
        words = ["serve", str(self.model), "--port", "0", "--dtype", "float32", "--stall-deadline", "4s", *options]
        return Server(self, self.folder / f"server-{self._count}.log", words)

    @staticmethod
    def tally(phase: str, kind: str, scope: str) -> Tally:
        return Tally(phase, kind, scope)

    @staticmethod
    def journal(path: str | None) -> Journal:
        return Journal(None if path is None else Path(path))

    case = staticmethod(Case)

    def arm(self, kind: Kind, scope: Scope, *, before: int, failing: int = 1) -> None:
        control = self.control
        control.kind = 0
        control.scope, control.before, control.failing = SCOPES[scope], before, failing
        control.calls = control.failed = 0
        control.kind = KINDS.index(kind) + 1

    def disarm(self) -> tuple[int, int]:
        """Calls that were counted, and how many of them failed."""
        self.control.kind = 0
        return self.control.calls, self.control.failed

    def judge(self, server: Server, expected: str, *, what: str, tally: Tally) -> str | None:
        """The server is up and answers right, or it ended and said why; anything between is bad.

        Returns:
            How it is; None when that is bad.
        """
        if server.alive and server.wait_up():
            for _ in range(2):  # a fault may only just have been noticed
                found, said = server.ask()
                if found == "right":
                    break
            if (found, said) == ("right", expected):
                return "up"
            tally.bad.append(f"{what}: up, but {found}: {said}")
        elif not server.alive:
            return self.judge_end(server, (1,), what=what, tally=tally)
        else:
            tally.bad.append(f"{what}: in between: {server.health().get('reason')}: {server.text()[-600:]}")
        return None

    @staticmethod
    def judge_end(server: Server, wanted: tuple[int, ...], *, what: str, tally: Tally) -> str | None:
        """How it ended; None when nobody could tell why."""
        end = server.how_it_ended(wanted=wanted)
        if end != "bad end":
            return end
        tally.bad.append(f"{what}: ended {server.status}: {server.text()[-600:]}")
        return None

    def sweep(
        self,
        tally: Tally,
        case: Callable[[Kind, Scope, int], Case],
        *,
        journal: Journal | None = None,
        most: int = 10_000,
        until_s: float = math.inf,
    ) -> Tally:
        """Every n until two runs make no n-th call, since some calls are made now and then only.

        Args:
            tally: of the phase, the kind of calls and where they fail.
            case: does the phase's work while the n-th call is to fail.
            journal: of cases that were run before, and where these are written.
            most: calls at most.
            until_s: the monotonic time at which no other case is begun.
        """
        kind, scope, misses = tally.kind, tally.scope, 0
        journal = journal or Journal(None)
        for n in range(most):
            end = journal.end_of(tally, n)
            if end is None:
                if time.monotonic() > until_s:
                    tally.ends["not reached in the time"] = 1
                    break
                what, bad = f"{tally.phase}, {kind} {n} of the {scope}", len(tally.bad)
                found = case(kind, scope, n)
                tally.bad += [
                    f"{what}: {said}: {found.server.text()[-600:]}" for word, said in found.outcomes if word == "lost"
                ]
                end = found.judge(what, tally) if found.failed else ""
                if found.alone:
                    found.server.kill()
                if end is not None and len(tally.bad) == bad:
                    journal.add(tally, n, end)
            if end == "":
                misses += 1
                if misses > 1:
                    break
                continue
            tally.calls += 1
            if end is not None:
                tally.ends[end] += 1
        return tally

    def close(self) -> None:
        assert self._nursery.stdin is not None
        self._nursery.stdin.close()
        self._nursery.wait(10)
        self._log.close()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The whole sweep takes an hour: only for those who ask for it."""
    if "faults" not in config.getoption("-m"):
        for item in items:
            if item.get_closest_marker("faults"):
                item.add_marker(pytest.mark.skip(reason="the whole sweep: pytest -m faults -s tests/faults"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = {
        "hidden_size": 128,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "n_routed_experts": 8,
    }
    return make_tiny(tmp_path_factory.mktemp("faults") / "tiny", config=small)


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Faults]:
    if sys.platform != "linux" or shutil.which("cc") is None:
        pytest.skip("the injector is preloaded on Linux, and compiled here")
    made = Faults(tmp_path_factory.mktemp("injector"), tiny)
    yield made
    made.close()
