"""Two machines and their cable, which is pulled in the middle of an answer: it goes on with the same words."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from exo_kimi.checkpoint.tiny.make import make_tiny
from tests.fetch.namespaces import Machine, two_machines

EXO_KIMI = [sys.executable, "-m", "exo_kimi"]
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
}
CLIENT = """
import httpx, json, sys, time
http = httpx.Client(base_url="http://127.0.0.1:52415", timeout=120, trust_env=False)
until = time.monotonic() + 90
while True:
    try:
        if http.get("/health").json()["status"] == "ok":
            break
    except (httpx.HTTPError, ValueError):
        pass
    assert time.monotonic() < until
    time.sleep(0.1)
body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 400, "temperature": 1.1, "seed": 3, "stream": True}
with http.stream("POST", "/v1/chat/completions", json=body) as answer:
    for line in answer.iter_lines():
        print(line, flush=True)
found = http.get("/metrics").text
for name in ("exo_kimi_resumed_tokens_total", "exo_kimi_requests_resumed_total"):
    print([each for each in found.splitlines() if each.startswith(name)][0], flush=True)
"""


class Running:
    """A process whose lines are read as they come."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def wait_for(self, text: str, *, times: int = 1) -> None:
        until_s = time.monotonic() + 90
        while sum(text in line for line in list(self.lines)) < times:
            assert self.process.poll() is None and time.monotonic() < until_s, "\n".join(self.lines[-20:])
            time.sleep(0.02)

    def end(self) -> list[str]:
        assert self.process.wait(120) == 0, "\n".join(self.lines[-20:])
        self._reader.join(5)
        return self.lines


def ask(machine: Machine) -> Running:
    return Running(machine.start([sys.executable, "-c", CLIENT]))


def words_of(lines: list[str]) -> str:
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert "data: [DONE]" in lines and not [event for event in events if "error" in event]
    return "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])


@pytest.mark.timeout(300)
def test_an_answer_outlives_a_pulled_cable(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path / "tiny", config={**SMALL, "n_routed_experts": 8})
    key = tmp_path / "cluster.key"
    with two_machines(tmp_path) as machines:
        one, other = machines.one, machines.other
        address = f"{other.host}:52500"
        stage = Running(
            other.start([*EXO_KIMI, "stage", "--listen", address, "--model", str(tiny), "--key-file", str(key)])
        )
        server: Running | None = None
        try:
            stage.wait_for("waiting for a leader")
            words = ["--stage", address, "--key-file", str(key), "--stall-deadline", "2s", "--dtype", "float32"]
            server = Running(one.start([*EXO_KIMI, "serve", str(tiny), "--port", "52415", *words]))
            server.wait_for("serving at")
            right = words_of(ask(one).end())
            asking = ask(one)
            asking.wait_for("data: {", times=30)
            one.plug("down")
            time.sleep(5)
            assert len(asking.lines) < 400, "it was over before the cable was pulled"
            one.plug("up")
            lines = asking.end()
            assert words_of(lines) == right
            assert lines[-1] == "exo_kimi_requests_resumed_total 1.0"
            kept = float(lines[-2].removeprefix("exo_kimi_resumed_tokens_total "))
            assert kept > 30, "both sides kept the caches of the prompt and of the tokens before the cut"
            assert ": ping" in lines, "the stream says meanwhile that it lives"
            assert stage.process.poll() is None, "the stage was cut off, and keeps its layers"
        finally:
            for running in (server, stage):
                if running is not None:
                    running.process.terminate()
                    running.process.wait(20)
