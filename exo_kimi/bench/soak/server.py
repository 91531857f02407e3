"""The server of a soak: a process with its log, its health, and what it holds of memory and descriptors."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from exo_kimi.errors import UsageError

START_S = 120.0
END_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a process holds now; None for what this system does not tell."""

    rss_bytes: int | None
    descriptors: int | None


def held_by(pid: int) -> Held:
    """What a process holds, from /proc, or from `ps` where there is none."""
    folder = Path(f"/proc/{pid}")
    try:
        pages = int((folder / "statm").read_text().split()[1])
        return Held(rss_bytes=pages * os.sysconf("SC_PAGE_SIZE"), descriptors=len(list((folder / "fd").iterdir())))
    except (OSError, IndexError):
        asked = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=False)
        text = asked.stdout.strip()
        return Held(rss_bytes=int(text) * 1024 if text.isdigit() else None, descriptors=None)


class SoakServer:
    """A running `exo-kimi serve`; made by `soak_server`."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, url: str) -> None:
        self.process = process
        self.log = log
        self.url = url
        self._http = httpx.Client(base_url=url, timeout=5.0, trust_env=False)

    @property
    def alive(self) -> bool:
        """Whether the process has not ended."""
        return self.process.poll() is None

    def health(self) -> dict[str, Any]:
        """The report of /health; empty when there is none within 5 s."""
        try:
            report: dict[str, Any] = self._http.get("/health").json()
        except (httpx.HTTPError, ValueError):
            return {}
        return report

    def is_ready(self) -> bool:
        """Whether it says that every stage is ready."""
        return self.health().get("status") == "ok"

    def wait_ready(self, within_s: float) -> bool:
        """Whether it says so in time."""
        until_s = time.monotonic() + within_s
        while self.alive and time.monotonic() < until_s:
            if self.is_ready():
                return True
            time.sleep(0.1)
        return False

    def stage_pids(self) -> list[int]:
        """Of the stages that run, in order."""
        return [stage["pid"] for stage in self.health().get("stages", []) if stage.get("pid")]

    def log_lines(self, count: int = 5) -> str:
        """The end of its log."""
        return " | ".join(self.log.read_text(errors="replace").splitlines()[-count:])

    def end(self) -> tuple[float, list[int]]:
        """Ctrl-C; after how many seconds it ended, and the stages that outlived it."""
        pids = self.stage_pids()
        began_s = time.monotonic()
        self.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(2 * END_S)
        took_s = time.monotonic() - began_s
        time.sleep(0.5)
        return took_s, [pid for pid in pids if _runs(pid)]


@contextlib.contextmanager
def soak_server(checkpoint: Path, folder: Path, options: Sequence[str]) -> Iterator[SoakServer]:
    """Start a server; whatever happens, it and its stages have ended when the context does.

    Args:
        checkpoint: what it serves.
        folder: for its log.
        options: of `exo-kimi serve`.

    Raises:
        UsageError: it did not start.
    """
    log = folder / "server.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "exo_kimi", "serve", str(checkpoint), "--port", "0", *options],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    try:
        server = SoakServer(process, log, _url(process, log))
        if not server.wait_ready(START_S):
            raise UsageError("the server did not become ready", found=server.log_lines(), expected=f"{START_S:g} s")
        yield server
    finally:
        if process.poll() is None:
            process.kill()  # its stages end with it
        process.wait()


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    until_s = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < until_s:
        if found := re.search(r"serving at (\S+)", log.read_text(errors="replace")):
            return found[1]
        time.sleep(0.1)
    raise UsageError("the server did not start", found=log.read_text(errors="replace")[-500:])


def _runs(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    if Path("/proc/self").exists():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
