"""Every n-th call of a kind fails once: the server is up again or has ended with a line, and no request is lost untold.

A few kinds in the suite; all of them over every phase with `pytest -m faults -s tests/faults`, which prints a table.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    Faults = Server = Tally = Any
KINDS = ("descriptor", "process", "write", "send", "map", "allocation")
STORING = ("--prefix-disk-bytes", "20MB", "--prefix-cache-bytes", "0B")
PHASES = ("serve", "stop", "start", "prefix store", "restart")
BLOCK_WORDS = 110  # two blocks of 256 tokens
Outcomes = list[tuple[str, str]]


class Kept:
    """One server for many faults; another when it ended."""

    def __init__(self, faults: Faults, *options: str) -> None:
        self._faults, self._options = faults, options
        self.running: Server = faults.start(*options)
        assert self.running.wait_up(), self.running.text()
        found, self.expected = self.running.ask()
        assert found == "right"

    def __call__(self) -> Server:
        paused = "prefixes are not written" in self.running.text()  # for a minute
        if paused or not self.running.alive or not self.running.wait_up():
            self.running.kill()
            self.running = self._faults.start(*self._options)
            assert self.running.wait_up(), self.running.text()
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
    server.wait_up(look_s=0.1)  # seldom: what looking costs is counted as well
    return outcomes


def prefixes() -> Callable[[Server], Outcomes]:
    """A prompt that nobody sent before, whose one block is written, and again, when it is read."""
    words = count()

    def act(server: Server) -> Outcomes:
        text = f"{next(words)} " + "and so on, " * BLOCK_WORDS
        first, _, again = server.ask(text), server.ask(), server.ask(text)  # blocks are written with later steps
        if first[0] == again[0] == "right" and first != again:
            again = "lost", f"other words from the disk: {first[1]!r}, {again[1]!r}"
        return [first, again]

    return act


def of_one(faults: Faults, kept: Kept, act: Callable[[Server], Outcomes]) -> Callable[..., Any]:
    """Cases of a phase that a running server goes through."""

    def case(kind: Any, scope: Any, before: int) -> Any:
        server = kept()
        faults.arm(kind, scope, before=before)
        try:
            outcomes = act(server)
        finally:
            _, failed = faults.disarm()
        judge = partial(judged_up, faults, server, kept.expected)
        return faults.case(server, failed, outcomes, judge, alone=False)

    return case


def starts(faults: Faults, expected: str) -> Callable[..., Any]:
    """From the first line to ready stages."""

    def case(kind: Any, scope: Any, before: int) -> Any:
        faults.arm(kind, scope, before=before)
        server = faults.start("--stages", "1")
        server.wait_up()
        failed = faults.disarm()[1]
        return faults.case(server, failed, [], partial(judged_up, faults, server, expected), alone=True)

    return case


def stops(faults: Faults) -> Callable[..., Any]:
    """Ctrl-C in the middle of a stream."""

    def case(kind: Any, scope: Any, before: int) -> Any:
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
        return faults.case(server, failed, outcomes, partial(judged_end, faults, server), alone=True)

    return case


def judged_up(faults: Faults, server: Server, expected: str, what: str, tally: Tally) -> str | None:
    return faults.judge(server, expected, what=what, tally=tally)


def judged_end(faults: Faults, server: Server, what: str, tally: Tally) -> str | None:
    return faults.judge_end(server, (0, 1), what=what, tally=tally)


@pytest.mark.parametrize(("kind", "scope"), [("descriptor", "server"), ("send", "server"), ("send", "stages")])
def test_a_call_that_fails_while_requests_are_served(faults: Faults, kept: Kept, kind: Any, scope: Any) -> None:
    tally = faults.sweep(faults.tally("serve", kind, scope), of_one(faults, kept, serve), most=3)
    assert tally.bad == []
    assert tally.calls >= 1


@pytest.mark.faults
@pytest.mark.timeout(8 * 3600)
def test_every_call_of_every_kind_in_every_phase(faults: Faults, kept: Kept) -> None:
    """`FAULTS_ONLY=serve,restart` chooses phases, `FAULTS_S` is when to end, `FAULTS_JOURNAL=FILE` goes on where that was."""
    only = os.environ.get("FAULTS_ONLY", ",".join(PHASES)).split(",")
    until_s = time.monotonic() + float(os.environ.get("FAULTS_S", "inf"))
    journal = faults.journal(os.environ.get("FAULTS_JOURNAL"))
    bad, calls = list[str](), 0
    print("\n| phase | kind | in | calls failed | came of it | bad | s |\n|---|---|---|---|---|---|---|")
    for phase in only:
        stores = phase == "prefix store"
        running = Kept(faults, "--stages", "2", *STORING) if stores else kept
        if phase in ("start", "stop"):
            cases = starts(faults, kept.expected) if phase == "start" else stops(faults)
        else:
            cases = of_one(faults, running, {"serve": serve, "restart": restart}.get(phase) or prefixes())
        for kind, scope in [(kind, scope) for scope in ("server", "stages") for kind in KINDS]:
            began_s = time.monotonic()
            tally = faults.sweep(faults.tally(phase, kind, scope), cases, journal=journal, until_s=until_s)
            lines = [f"{tally.row()} {time.monotonic() - began_s:.0f} |", *tally.bad]
            print(*lines, sep="\n  ", flush=True)
            bad.extend(tally.bad)
            calls += tally.calls
        if stores:
            running.running.kill()
    print(f"{calls} calls failed, {len(bad)} bad")
    assert bad == []
