"""Every n-th call of a kind fails once: the server is up again or has ended with a line, and no request is lost untold.

A few kinds in the suite; all of them over every phase with `pytest -m faults -s tests/faults`, which prints a table.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    Faults = Server = Tally = Any
KINDS = ("descriptor", "process", "write", "send", "map", "allocation")
Outcomes = list[tuple[str, str]]


class Kept:
    """One server for many faults; another when it ended."""

    def __init__(self, faults: Faults, *options: str) -> None:
        self._faults, self._options = faults, options
        self.running: Server = faults.start(*options)
        assert self.running.wait_up(), self.running.text()
        found, self.expected = self.running.ask()
        assert found == "right"
        self.started = 1

    def __call__(self) -> Server:
        if not self.running.alive or not self.running.wait_up():
            self.running.kill()
            self.running = self._faults.start(*self._options)
            assert self.running.wait_up(), self.running.text()
            self.started += 1
        return self.running


@pytest.fixture(scope="module")
def kept(faults: Faults) -> Iterator[Kept]:
    one = Kept(faults, "--stages", "2")
    yield one
    one.running.kill()


def serve(server: Server) -> Outcomes:
    return [server.ask(), server.ask(stream=True)]


def restart(server: Server) -> Outcomes:
    """A stage is killed in the middle of a stream."""
    while not (pids := server.pids()):  # what fails may be just this question
        time.sleep(0.05)
    outcomes: Outcomes = []
    streaming = threading.Thread(target=lambda: outcomes.append(server.ask(stream=True, max_tokens=60)))
    streaming.start()
    time.sleep(0.05)
    os.kill(pids[-1], signal.SIGKILL)
    streaming.join()
    server.wait_up(look_s=0.25)  # seldom: what looking costs is counted as well
    return outcomes


@pytest.mark.parametrize(("kind", "scope"), [("descriptor", "server"), ("send", "server"), ("send", "stages")])
def test_a_call_that_fails_while_requests_are_served(faults: Faults, kept: Kept, kind: Any, scope: Any) -> None:
    tally = faults.sweep("serve", kind, scope, serve, server=kept, expected=kept.expected, most=3)
    assert tally.bad == []
    assert tally.calls >= 1


def prefixes(words: Iterator[int]) -> Callable[[Server], Outcomes]:
    """A prompt that nobody sent before, whose blocks are written, and again, when they are read."""

    def act(server: Server) -> Outcomes:
        text = f"{next(words)} " + "and so on, " * 120
        first, again = server.ask(text), server.ask(text)
        if first[0] == again[0] == "right" and first != again:
            again = "lost", f"other words from the disk: {first[1]!r}, {again[1]!r}"
        return [first, again]

    return act


def start(faults: Faults, kind: Any, scope: Any, before: int) -> tuple[Server, int]:
    """From the first line to ready stages; how many calls failed on the way."""
    faults.arm(kind, scope, before=before)
    server = faults.start("--stages", "1")
    server.wait_up()
    return server, faults.disarm()[1]


def stop(faults: Faults, kind: Any, scope: Any, before: int) -> tuple[Server, int, Outcomes]:
    """Ctrl-C in the middle of a stream."""
    server, outcomes = faults.start("--stages", "1"), []
    assert server.wait_up(), server.text()
    streaming = threading.Thread(target=lambda: outcomes.append(server.ask(stream=True, max_tokens=4000)))
    streaming.start()
    time.sleep(0.1)
    pids = server.pids()
    faults.arm(kind, scope, before=before)
    server.signal(signal.SIGINT)
    if not server.wait_end():
        outcomes.append(("lost", "it did not end"))
    _, failed = faults.disarm()
    streaming.join()
    until_s = time.monotonic() + 5
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        if time.monotonic() > until_s:
            outcomes.append(("lost", f"stages are left: {left}"))
            break
        time.sleep(0.02)
    return server, failed, outcomes


@pytest.mark.faults
@pytest.mark.timeout(4 * 3600)
def test_every_call_of_every_kind_in_every_phase(faults: Faults, kept: Kept) -> None:
    """`FAULTS_ONLY=serve,restart` chooses phases, `FAULTS_S` the seconds that each kind in each phase may take."""
    only = os.environ.get("FAULTS_ONLY", "serve,restart,prefix store,start,stop").split(",")
    limit_s = float(os.environ.get("FAULTS_S", "600"))
    expected, bad, calls = kept.expected, list[str](), 0

    def add(tally: Tally) -> None:
        nonlocal calls
        print(tally.row(), *(f"\n  {line}" for line in tally.bad), flush=True)
        bad.extend(tally.bad)
        calls += tally.calls

    print("\n| phase | kind | in | calls failed | came of it | bad |\n|---|---|---|---|---|---|")
    both = [(kind, scope) for scope in ("server", "stages") for kind in KINDS]
    for phase, act in (("serve", serve), ("restart", restart)):
        for kind, scope in both if phase in only else ():
            add(faults.sweep(phase, kind, scope, act, server=kept, expected=expected, deadline_s=limit_s))
    if "prefix store" in only:
        stored = Kept(faults, "--stages", "2", "--prefix-disk-bytes", "20MB", "--prefix-cache-bytes", "0B")
        act = prefixes(count())
        for kind, scope in both:
            add(faults.sweep("prefix store", kind, scope, act, server=stored, expected=expected, deadline_s=limit_s))
        stored.running.kill()
    for phase in ("start", "stop"):
        for kind, scope in both if phase in only else ():
            add(faults.life(phase, kind, scope, start if phase == "start" else stop, expected, deadline_s=limit_s))
    print(f"{calls} calls failed, {len(bad)} bad")
    assert bad == []
