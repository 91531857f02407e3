"""The end of the server: within 5 s of Ctrl-C whatever runs, and at once with one line when it can serve no more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from exo_kimi.runtime import end_signals

ROOT = Path(__file__).parents[2]
SERVER = """
import asyncio, logging, sys, time
from exo_kimi.cli import main
from exo_kimi.errors import StageError
from exo_kimi.runtime import end_signals
from exo_kimi.serve.server import Served, run

logging.basicConfig()
end_signals.END_S = DEADLINE

class Engine:
    def snapshot(self): raise NotImplementedError
    async def close(self): print("closed", flush=True)

async def app(scope, receive, send): ...

def in_c():
    # A call that lets go of the interpreter and comes back from no signal, as a product of MLX does.
    import ctypes, threading
    threading.Timer(0.2, lambda: print("http://busy", flush=True)).start()
    while True:
        ctypes.CDLL(None).sleep(1000)

def in_python():
    print("http://busy", flush=True)
    while True:
        pass

async def factory():
    WORK
    return Served(app=app, engine=Engine(), wait_failed=FAILED)

async def failed():
    await asyncio.sleep(0.5)
    raise StageError("the engine stopped", found="a bug")

def announce(url): print(url, flush=True)

import exo_kimi.cli.app
exo_kimi.cli.app.run = lambda words: run(factory, port=0, progress=False, announce=announce) or 0
sys.exit(main([]))
"""
# Where the server is busy when the signal comes.
WORK = {
    "a worker thread": "asyncio.get_running_loop().run_in_executor(None, time.sleep, 60)",
    "the loop, in Python": "asyncio.get_running_loop().call_later(0.3, in_python)",
    "the loop, in C": "asyncio.get_running_loop().call_later(0.3, in_c)",
    "the start, in C": "in_c()",
    "the start": "print('http://starting', flush=True); await asyncio.sleep(60)",
}


def started(work: str, *, failed: str = "None", deadline_s: float = 1.0) -> subprocess.Popen[str]:
    code = SERVER.replace("WORK", work).replace("FAILED", failed).replace("DEADLINE", str(deadline_s))
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize(("where", "signals"), [*((where, 1) for where in WORK), ("a worker thread", 2)])
def test_ctrl_c_ends_within_5_s_whatever_is_computed(where: str, signals: int) -> None:
    deadline_s = end_signals.END_S if where == "the loop, in C" else 1.0
    process = started(WORK[where], deadline_s=deadline_s)
    guard = threading.Timer(40, process.kill)
    guard.start()
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("http://")
        time.sleep(0.5)
        began_s = time.monotonic()
        process.send_signal(2)
        if signals == 2:
            time.sleep(0.2)
            process.send_signal(2)
        output, errors = process.communicate()
        assert time.monotonic() - began_s < end_signals.END_S + 5
        assert process.returncode == (0 if signals == 1 else 1), errors
        assert "closed" in output or where != "a worker thread"
        assert "Traceback" not in errors
    finally:
        guard.cancel()
        process.kill()


@pytest.mark.parametrize("work", ["in_c", "in_python"])
def test_a_loop_that_is_stuck_for_good_ends_the_server_with_a_line(work: str) -> None:
    begin = (
        f"import exo_kimi.serve.loop_watch as w; w.STUCK_S = 1.2; asyncio.get_running_loop().call_later(0.5, {work})"
    )
    process = started(begin)
    _, errors = process.communicate(timeout=40)
    assert process.returncode == 1
    (line,) = errors.splitlines()
    assert "the server has been stuck for 1 s in <string>, line" in line


def test_a_server_that_was_suspended_is_not_taken_for_stuck() -> None:
    process = started("import exo_kimi.serve.loop_watch as w; w.STUCK_S = 0.6")
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("http://")
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    finally:
        process.kill()


@pytest.mark.parametrize("where", ["pass", WORK["a worker thread"]])
def test_an_engine_that_has_broken_ends_the_server_with_its_reason(where: str) -> None:
    process = started(where, failed="failed")
    output, errors = process.communicate(timeout=40)
    assert process.returncode == 1
    assert "closed" in output
    assert "the engine stopped" in errors
    assert "Traceback" not in errors


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a full device")
def test_a_full_disk_under_the_log_does_not_keep_the_server_from_serving() -> None:
    process = started("sys.stdout = open('/dev/full', 'w')")
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "serving at http://127.0.0.1:" in line
        assert "No space left" in line
        process.send_signal(signal.SIGINT)
        assert process.wait(10) in (0, 120)  # 120: Python could not flush it either
    finally:
        process.kill()
