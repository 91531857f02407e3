"""Streams on the wire: event form, pings, failures, and clients that leave."""

from __future__ import annotations

import asyncio
import json
import time

import httpx
import pytest

from exo_kimi.errors import StageStalledError

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "Hi"}]}


async def until(condition, seconds=30.0):
    """Wait for a condition that another thread makes true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        await asyncio.sleep(0.01)


def events_of(text):
    """The data of server-sent events, each of which must be one line of `data:`."""
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    return [block.removeprefix("data: ") for block in blocks if not block.startswith(":")]


async def test_every_event_is_one_line_whatever_the_text_holds(saying, client_of):
    text = "a\nb\r\nc d e\x85f\x7f"
    async with client_of(saying(text)) as client:
        response = await client.post(CHAT, json={**ASK, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    *chunks, done = events_of(response.text)
    assert done == "[DONE]"
    assert len("\n".join(chunks).splitlines()) == len(chunks)
    deltas = [json.loads(chunk)["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == text


@pytest.mark.parametrize("options", [{}, {"include_usage": False}, None])
async def test_done_comes_whatever_the_stream_options(saying, client_of, options):
    async with client_of(saying()) as client:
        response = await client.post(CHAT, json={**ASK, "stream": True, "stream_options": options})
    events = events_of(response.text)
    assert events[-1] == "[DONE]"
    assert '"usage"' not in response.text


async def test_a_long_prefill_is_bridged_by_pings(saying, live):
    server = live(saying(first_delay_s=0.4), ping_interval_s=0.05)
    async with httpx.AsyncClient() as client:
        response = await client.post(server.url + CHAT, json={**ASK, "stream": True})
    pings = [line for line in response.text.splitlines() if line == ": ping"]
    assert 2 <= len(pings) <= 10
    events = events_of(response.text)
    assert json.loads(events[0])["choices"][0]["delta"]["role"] == "assistant"
    assert events[-1] == "[DONE]"


async def test_a_failure_in_the_stream_is_an_error_event_and_then_done(saying, client_of):
    engine = saying(break_at=3, fault=StageStalledError("stage 1 is silent", stage=1))
    async with client_of(engine) as client:
        response = await client.post(CHAT, json={**ASK, "stream": True})
    *_, error, done = events_of(response.text)
    assert response.status_code == 200
    assert done == "[DONE]"
    assert json.loads(error)["error"] == {
        "message": "stage 1 is silent",
        "type": "server_error",
        "param": None,
        "code": "stage_stalled",
    }


async def test_one_failed_choice_cancels_the_others(saying, client_of):
    engine = saying(break_at=3, fault=StageStalledError("stage 1 is silent"))
    async with client_of(engine) as client:
        response = await client.post(CHAT, json={**ASK, "n": 4})
        assert response.status_code == 503
        assert response.headers["retry-after"]
    await until(lambda: len(engine.cancelled) == 4 and not engine.open)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_cancels_its_generation(saying, live, stream):
    engine = saying("word " * 2000, delay_s=0.01)
    server = live(engine)
    async with httpx.AsyncClient() as client:
        if stream:
            async with client.stream("POST", server.url + CHAT, json={**ASK, "stream": True, "n": 2}) as response:
                lines = response.aiter_lines()
                for _ in range(12):
                    await anext(lines)
        else:
            with pytest.raises(httpx.ReadTimeout):
                await client.post(server.url + CHAT, json={**ASK, "n": 2}, timeout=0.3)
        assert len(engine.requests) == 2
    await until(lambda: not engine.open)
    assert len(engine.cancelled) == 2
    assert not engine.finished


async def test_a_client_that_leaves_during_prefill_cancels_it(saying, live):
    engine = saying(first_delay_s=30)
    server = live(engine)
    async with httpx.AsyncClient() as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.post(server.url + CHAT, json={**ASK, "stream": True}, timeout=0.3)
    await until(lambda: engine.cancelled)


async def test_sixty_four_at_once_all_get_their_answer(saying, live):
    engine = saying("Hello there, friend.", delay_s=0.001)
    server = live(engine)
    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(limits=limits, timeout=30) as client:

        async def ask(index):
            response = await client.post(server.url + CHAT, json={**ASK, "stream": index % 2 == 0})
            return response.text

        texts = await asyncio.gather(*(ask(index) for index in range(64)))
    for index, text in enumerate(texts):
        if index % 2:
            assert json.loads(text)["choices"][0]["message"]["content"] == "Hello there, friend."
        else:
            chunks = [json.loads(event) for event in events_of(text)[:-1]]
            said = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
            assert "".join(said) == "Hello there, friend."


async def test_a_slow_prompt_does_not_block_the_others(saying, live):
    """Rendering and tokenizing run beside the event loop: /health answers while a long prompt is prepared."""
    server = live(saying(context=2**20))
    long = {"messages": [{"role": "user", "content": "many words and 123 numbers " * 60_000}]}
    async with httpx.AsyncClient(timeout=60) as client:
        slow = asyncio.create_task(client.post(server.url + CHAT, json=long))
        answered = 0
        while not slow.done():
            assert (await client.get(server.url + "/health")).status_code == 200
            answered += 1
            await asyncio.sleep(0.02)
        assert (await slow).status_code == 200
    assert answered > 3, "one answer before and one after would do, were the loop held up"
