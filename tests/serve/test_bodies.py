"""Bodies are read within bounds: of bytes, values and text, off the event loop, and for as long as the client waits."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exo_kimi.chat.template import ChatTemplate
from exo_kimi.checkpoint.rendering.messages import RenderLimits
from exo_kimi.checkpoint.rendering.pool import RenderPool
from exo_kimi.checkpoint.rendering.template import CompiledTemplate
from exo_kimi.errors import ContextLengthError, RequestError
from exo_kimi.serve.body import MAX_BODY_BYTES, MAX_STRUCTURAL_CHARACTERS, StructureMeter, TextBound, parse_object
from exo_kimi.serve.problems import ApiProblem
from exo_kimi.serve.workers import SMALL_BYTES, HeldBytes

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
LOOP_IF_ASKED = "{% if 'loop' in messages[0].content %}" + LOOP + "{% endif %}{{ messages[0].content }}"
# The most of each kind that is not refused by its size or its values.
MOST_BYTES = {
    "text": MAX_BODY_BYTES,
    "emoji": MAX_BODY_BYTES,
    "parts": (MAX_STRUCTURAL_CHARACTERS - 9) // 6 * 26,
    "lists": MAX_STRUCTURAL_CHARACTERS - 9,
    "ids": MAX_STRUCTURAL_CHARACTERS * 5 - 40,
}
STUB = Path(__file__).parent / "stub_server.py"
CHAT = "/v1/chat/completions"
_STRING = re.compile(r'"(?:[^"\\]|\\.)*("|$)', re.DOTALL)


def structural(text: str) -> int:
    """The slow oracle: all strings of the whole text taken out, then counted."""
    return sum(_STRING.sub("", text).count(character) for character in "[]{}:,")


@given(text=st.text(st.sampled_from('[]{}:,"\\a\n'), max_size=40), cuts=st.lists(st.integers(0, 40), max_size=6))
def test_structure_is_counted_however_the_body_is_cut(text: str, cuts: list[int]) -> None:
    if text.endswith("\\"):
        text += "n"
    meter = StructureMeter()
    places = sorted(min(cut, len(text)) for cut in cuts)
    for start, end in itertools.pairwise([0, *places, len(text)]):
        meter.feed(text[start:end].encode())
    # A backslash outside of a text is no JSON and may be counted in any way.
    if "\\" not in _STRING.sub("", text):
        assert meter.count == structural(text)


@pytest.mark.timeout(120)
def test_counting_is_linear_in_bytes_that_are_no_json() -> None:
    """Every escaped quote could begin a text that never ends: each piece is still looked at a constant number of times. A
    hundredth of a second, or hours."""
    for hostile in (b'"' + b'\\"' * 2**20, b'\\"' * 2**20, b'"' * 2**20, b"\\" * 2**20):
        meter = StructureMeter()
        meter.feed(hostile)
        assert meter.count == 0


def test_too_many_values_are_refused_before_they_are_made() -> None:
    meter = StructureMeter()
    with pytest.raises(RequestError, match="too many values"):
        for _ in range(1000):
            meter.feed(b"[]," * 1000)
    assert meter.count < MAX_STRUCTURAL_CHARACTERS + 3001


def test_text_that_no_context_can_hold_is_refused_with_the_numbers() -> None:
    bound = TextBound(context=1000, token_bytes=8)
    body = {"messages": [{"role": "user", "content": "x" * (bound.most_bytes - 23)}]}  # 23: the other names
    assert parse_object(json.dumps(body).encode(), bound=bound) == body
    body["messages"][0]["content"] += "x"
    with pytest.raises(
        ContextLengthError, match=f"(?s)at most {bound.most_bytes} bytes.*{bound.most_bytes + 1} bytes"
    ) as error:
        parse_object(json.dumps(body).encode(), bound=bound)
    assert error.value.code == "context_length_exceeded"


async def test_all_bodies_together_have_a_bound_and_small_ones_do_not_count() -> None:
    held = HeldBytes(1000)
    async with held.counting() as first, held.counting() as second, held.counting() as small:
        first(SMALL_BYTES + 600)
        with pytest.raises(ApiProblem) as error:
            second(SMALL_BYTES + 401)
        assert error.value.status == 503
        second(SMALL_BYTES + 400)
        small(SMALL_BYTES)
    async with held.counting() as again:
        again(SMALL_BYTES + 1000)


async def test_a_request_whose_client_leaves_is_never_generated(saying: Any, live: Any) -> None:
    engine = saying(context=2**20)
    server = live(engine)
    long = {"messages": [{"role": "user", "content": "many words and 123 numbers " * 60_000}]}
    async with httpx.AsyncClient() as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.post(server.url + CHAT, json=long, timeout=httpx.Timeout(60, read=0.02))
        await asyncio.sleep(0.1)
        assert (
            await client.post(server.url + CHAT, json={"messages": [{"role": "user", "content": "hi"}]}, timeout=60)
        ).status_code == 200
    assert len(engine.requests) == 1


async def test_templates_without_end_are_a_400_and_leave_the_chat_of_others_alone(
    saying: Any, voice: Any, live: Any
) -> None:
    pool = RenderPool(RenderLimits(cpu_s=0.25))
    template = CompiledTemplate(LOOP_IF_ASKED, "test", pool=pool)
    server = live(saying(by=replace(voice, template=ChatTemplate(voice.tokenizer, template))))

    async def ask(client: httpx.AsyncClient, text: str) -> httpx.Response:
        return await client.post(server.url + CHAT, json={"messages": [{"role": "user", "content": text}]})

    async with httpx.AsyncClient(timeout=60) as client:
        looping = [asyncio.create_task(ask(client, "loop")) for _ in range(8)]
        await asyncio.sleep(0.05)
        assert (await ask(client, "hello")).status_code == 200
        assert not all(task.done() for task in looping)
        for task in looping:
            error = (await task).json()["error"]
            assert (await task).status_code == 400
            assert error["message"] == "the chat template takes too much time, memory or text: it computes without end"
    pool.close()


def body_of(kind: str, size: int) -> bytes:
    """A body of about so many bytes, which is refused at the latest when it has been prepared."""
    head, unit, tail = {
        "text": (b'{"messages":[{"role":"user","content":"', b"a few words, ", b'"}]}'),
        "emoji": (b'{"messages":[{"role":"user","content":"', "é🙂".encode(), b'"}]}'),
        "parts": (b'{"messages":[{"role":"user","content":[', b'{"type":"text","text":"a"},', b"1]}]}"),
        "lists": (b'{"messages":[', b"[],", b"[]]}"),
        "ids": (b'{"prompt":[', b"1234,", b'"none"]}'),
    }[kind]
    return head + unit * ((size - len(head) - len(tail)) // len(unit)) + tail


class Listener(threading.Thread):
    """A client of a stream without end: the seconds between its events."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url = url
        self.gaps_s: list[float] = []

    def run(self) -> None:
        body = {"messages": [{"role": "user", "content": "count"}], "stream": True}
        with (
            contextlib.suppress(httpx.HTTPError),
            httpx.stream("POST", self._url + CHAT, json=body, timeout=60) as response,
        ):
            last_s = time.monotonic()
            for _ in response.iter_raw():
                now_s = time.monotonic()
                self.gaps_s.append(now_s - last_s)
                last_s = now_s


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_huge_bodies_of_five_kinds_leave_a_stream_and_the_memory_alone(voice: Any) -> None:
    """With their length declared, without, and of the size that is still read: no token of the stream waits for them."""
    command = [sys.executable, str(STUB), str(voice.directory), "0", str(2**18)]
    huge = {kind: body_of(kind, 60 * 10**6) for kind in MOST_BYTES}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            listener = Listener(url)
            listener.start()
            time.sleep(1.5)
            before_bytes, calm_s = _peak_bytes(process.pid), max(listener.gaps_s[2:])
            listener.gaps_s.clear()
            for kind, most_bytes in MOST_BYTES.items():
                path = "/v1/completions" if kind == "ids" else CHAT
                for content in (huge[kind], _pieces(huge[kind]), body_of(kind, most_bytes)):
                    response = httpx.post(url + path, content=content, timeout=60)
                    assert response.status_code in (400, 413), (kind, response.text[:200])
            longest_s, taken_bytes = max(listener.gaps_s), _peak_bytes(process.pid) - before_bytes
        finally:
            process.kill()
    assert len(listener.gaps_s) > 20
    busy = os.getloadavg()[0] > (
        os.cpu_count() or 1
    )  # other tests compute meanwhile, and the kernel makes everybody wait
    assert longest_s < calm_s + (3.0 if busy else 0.5)
    assert taken_bytes < 300e6


def _pieces(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), 2**18):
        yield data[start : start + 2**18]


def _peak_bytes(pid: int) -> int:
    found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024
