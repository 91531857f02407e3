"""A template may compute, write or grow without end, when it compiles or when it renders: it is stopped, and nothing else is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from exo_kimi.chat.template import ChatTemplate
from exo_kimi.checkpoint.doctor.doctor import doctor
from exo_kimi.checkpoint.rendering import pool as pools
from exo_kimi.checkpoint.rendering.messages import RenderFailure, RenderLimits, unpack_answer
from exo_kimi.checkpoint.rendering.pool import RenderPool, resident_bytes, shared_pool
from exo_kimi.checkpoint.rendering.template import CompiledTemplate
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.errors import OverloadedError, TemplateError

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
LOOP_IF_ASKED = "{% if 'loop' in messages[0].content %}" + LOOP + "{% endif %}{{ messages[0].content }}"
HOSTILE = {
    "a power, folded at compile time": "{{ 9 ** (9 ** 9) }}",
    "a power of variables": "{% set n = messages|length + 8 %}{{ n ** (n ** n) }}",
    "a long text": "{{ 'x' * 3000000000 }}",
    "a long text of variables": "{{ messages[0].content * 3000000000 }}",
    "a long list": "{{ (messages * 3000000000)|length }}",
    "padding": "{{ 'x'|center(3000000000) }}",
    "padding by format": "{{ '%3000000000d' % 1 }}",
    "doubling": "{% set ns = namespace(x='a' * 999) %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "a loop": LOOP,
    "a number of 5,000 digits": "{{ " + "9" * 5000 + " }}",
    "a factorial": "{% set ns = namespace(x=9) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x > 1 }}",
    "writing": "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'x' * 9000 }}{% endfor %}{% endfor %}",
}


def said(text: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": text}]}


@pytest.fixture
def quick() -> Iterator[RenderPool]:
    """A pool that gives less time than people have on a machine that is shared with other tests."""
    pool = RenderPool(RenderLimits(cpu_s=0.3))
    yield pool
    pool.close()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's limit of memory; elsewhere `ps` is asked")
@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_has_no_end_is_refused_when_it_is_loaded(name: str, quick: RenderPool) -> None:
    started_s = time.monotonic()
    with pytest.raises(TemplateError) as error:
        CompiledTemplate(HOSTILE[name], "chat_template.jinja", pool=quick)
    assert time.monotonic() - started_s < 20
    assert error.value.found
    assert "chat_template.jinja" in str(error.value)
    assert quick.render("{{ messages[0].content }}", said("and on it goes")) == "and on it goes"


def test_a_checkpoint_with_such_a_template_is_refused_by_name(tmp_path: Path) -> None:
    """By everything that loads it, and by the doctor: one error, no traceback."""
    directory = make_tiny(tmp_path / "tiny")
    (directory / "chat_template.jinja").write_text("a\n{{ " + "9" * 5000 + " }}")
    with pytest.raises(TemplateError, match=r"does not compile\n  found     ValueError: Exceeds the limit"):
        Speaker.from_directory(directory)
    assert "does not compile" in "".join(str(finding.error) for finding in doctor(directory).errors)
    (directory / "chat_template.jinja").write_text("a\n{{ 9 ** (9 ** 9) }}")
    with pytest.raises(
        TemplateError, match=r"(?s)too much time.*a power of over 65536 bits.*chat_template.jinja, line 2"
    ):
        Speaker.from_directory(directory)
    assert "too much time" in "".join(str(finding.error) for finding in doctor(directory).errors)


def test_eight_renderings_without_end_leave_the_ninth_alone() -> None:
    pool = RenderPool(RenderLimits(cpu_s=0.25))
    outcomes: list[str] = []

    def loop() -> None:
        with pytest.raises(RenderFailure) as failure:
            pool.render(LOOP_IF_ASKED, said("loop"))
        outcomes.append(failure.value.found)

    threads = [threading.Thread(target=loop) for _ in range(8)]
    try:
        for thread in threads:
            thread.start()
        assert pool.render(LOOP_IF_ASKED, said("hello")) == "hello"
        assert len(outcomes) < 8, "the ninth waited for the eight"
        for thread in threads:
            thread.join(60)
        assert outcomes == ["it computes without end"] * 8
        assert pool.render(LOOP_IF_ASKED, said("hello")) == "hello"
    finally:
        pool.close()


def test_when_all_processes_are_busy_the_next_is_told_to_come_back(
    quick: RenderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "WAIT_S", 0.01)
    quick._places = threading.BoundedSemaphore(1)
    with quick._places, pytest.raises(OverloadedError) as error:
        quick.render("x", {})
    assert error.value.code == "overloaded"
    assert quick.render("x", {}) == "x"


def test_memory_is_watched_where_the_kernel_holds_no_limit() -> None:
    asked: list[int] = []

    def told(pid: int) -> int:
        asked.append(resident_bytes(pid))
        return 2**40

    pool = RenderPool(RenderLimits(cpu_s=30), resident_bytes=told)
    with pytest.raises(RenderFailure, match="too much memory"):
        pool.render(LOOP, said("hi"))
    assert asked == [pytest.approx(40e6, rel=0.9)]
    assert resident_bytes(2**22 + 1) == 0


def test_a_process_that_was_killed_is_replaced(quick: RenderPool) -> None:
    assert quick.render("one", {}) == "one"
    (process,) = quick._idle
    os.kill(process._process.pid, signal.SIGKILL)
    process._process.wait()
    assert quick.render("two", {}) == "two"


def test_a_process_ends_with_its_parent(quick: RenderPool) -> None:
    assert quick.render("one", {}) == "one"
    (process,) = quick._idle
    process._input.close()  # as the kernel does
    assert process._process.wait(10) == 0


def test_ordinary_renderings_share_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting Python is not what a conversation waits for."""
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: started.append(args) or popen(*args, **options))
    directory = make_tiny(tmp_path / "tiny")
    template = ChatTemplate.from_directory(directory, Speaker.from_directory(directory).tokenizer)
    turns = [{"role": ("user", "assistant")[index % 2], "content": "some words " * 50} for index in range(21)]
    assert len({template.render(turns).text for _ in range(20)}) == 1
    assert len(started) <= 1  # none, where an earlier test left the shared pool one


@pytest.mark.parametrize(
    "answer", [b"", b"x", b"f", b"f[]", b'f["other", "x", 1]', b'f["limit", 3, 1]', b"t\xff", b'f{"a": 1}']
)
def test_nonsense_from_a_process_is_no_answer(answer: bytes) -> None:
    with pytest.raises((ValueError, TypeError)):
        unpack_answer(answer)


def test_values_that_are_no_json_fail_as_the_template_does() -> None:
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    for value in (object(), deep):
        with pytest.raises(RenderFailure, match="nested too deep, or hold what is no JSON"):
            shared_pool().render("x", {"messages": value})
