"""`exo-kimi serve --expert-cache` over two stages, in a process of its own, for tests of what a failing disk does to it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

import exo_kimi
from exo_kimi.planner.command import model_bytes

ROOT = Path(exo_kimi.__file__).parents[1]
UP_S, ANSWER_S, STALL_S = 120, 90, 3


class StreamingServer:
    """A running server.

    Args:
        model: the checkpoint.
        folder: for its log.
        slots: experts of a layer that are held.
        environment: beside this process's.
        options: more of `serve`.
    """

    def __init__(
        self,
        model: Path,
        folder: Path,
        *,
        slots: int,
        environment: Mapping[str, str] | None = None,
        options: tuple[str, ...] = (),
    ) -> None:
        self.log = folder / "log"
        weights = model_bytes(directory=model)
        # float32 scales and biases take more than stored ones
        cache = 2 * slots * weights.slot_bytes(0, weights.layers)
        words = ["serve", str(model), "--stages", "2", "--dtype", "float32", "--port", "0", "--context", "256"]
        words += ["--expert-cache", f"{cache}B", "--stall-deadline", f"{STALL_S}s", "--speculate", "off"]
        words += ["--prefix-cache-bytes", "0B", *options]
        self._log = self.log.open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "exo_kimi", *words],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
            start_new_session=True,
        )
        self.url = ""
        try:
            self.wait_up()
        except BaseException:
            self.end()
            raise

    def wait_up(self) -> None:
        """Until it is ready."""
        until_s = time.monotonic() + UP_S
        while self.health().get("status") != "ok":
            assert self.process.poll() is None and time.monotonic() < until_s, self.log.read_text()
            time.sleep(0.1)

    def health(self) -> dict[str, Any]:
        """As it says; empty while it says nothing."""
        if not self.url:
            found = re.search(r"serving at ([^\s,]+)", self.log.read_text())
            self.url = found[1] if found else ""
        if not self.url:
            return {}
        try:
            report: dict[str, Any] = httpx.get(f"{self.url}/health", timeout=10, trust_env=False).json()
            return report
        except (httpx.HTTPError, ValueError):
            return {}

    def ask(self, text: str, *, max_tokens: int = 6) -> tuple[int, str]:
        """Status, and the text or the error's message."""
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, "temperature": 0}
        answer = httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=ANSWER_S, trust_env=False)
        content = json.loads(answer.content)
        if answer.status_code != 200:
            return answer.status_code, content["error"]["message"]
        return 200, content["choices"][0]["message"]["content"]

    def restarts(self) -> int:
        """Of stages, since it began."""
        text = httpx.get(f"{self.url}/metrics", timeout=10, trust_env=False).text
        (count,) = re.findall(r"^exo_kimi_stage_restarts_total (\S+)$", text, re.M)
        return round(float(count))

    def end(self) -> None:
        """Stop it, one way or the other."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
        self._log.close()
