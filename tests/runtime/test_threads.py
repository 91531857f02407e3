"""Threads that begin or say why not."""

from __future__ import annotations

import threading
import time

import pytest

from exo_kimi.errors import machine_error
from exo_kimi.runtime import threads
from exo_kimi.runtime.threads import start_daemon


def test_a_thread_runs_under_its_name_and_tells_its_end() -> None:
    names: list[str] = []
    ended = start_daemon(lambda: names.append(threading.current_thread().name), name="some-work")
    assert ended.wait(5)
    assert names == ["some-work"]


def test_a_thread_that_never_begins_is_an_error_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Thread.start` waits for ever: a server whose Ctrl-C had no memory to be heard neither started nor ended."""
    monkeypatch.setattr(threads, "START_S", 0.05)
    monkeypatch.setattr(threads._thread, "start_new_thread", lambda *_: 1)
    began_s = time.monotonic()
    with pytest.raises(RuntimeError) as raised:
        start_daemon(lambda: None, name="never")
    assert time.monotonic() - began_s < 5
    assert machine_error(raised.value) is not None
