"""Chat completions of legacy exo for our model: what is honoured, what is refused by name, and in which fields a reply leaves."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exo_kimi.chat.tokenizer import KimiTokenizer
from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.plugin.legacy import hook
from exo_kimi.plugin.legacy.chat_api import read_chat
from exo_kimi.plugin.legacy.replies import Liveness
from exo_kimi.runtime.stage.sampling import Sampled

PROMPT = "the sea is"
TOKENS = 12


@pytest.fixture(scope="module")
def said(legacy_models: Any, tiny: Path) -> str:
    """What the whole model says in one process, greedily."""
    ids = legacy_models.kimi_reply(tiny, PROMPT, TOKENS)
    return KimiTokenizer.from_directory(tiny).decode(ids)


@pytest.fixture
def cluster(make: Callable[..., Any]) -> Any:
    made = make()
    for node in made.nodes:
        node.max_generate_tokens = 64
    return made


def message(reply: Any) -> dict[str, Any]:
    assert reply.status == 200, reply.body
    found: dict[str, Any] = reply.body["choices"][0]["message"]
    return found


def events(reply: Any) -> list[dict[str, Any]]:
    assert reply.ended and reply.written[-1] == "data: [DONE]\n\n"
    return [json.loads(each.removeprefix("data: ")) for each in reply.written[:-1]]


def text(chunks: list[dict[str, Any]], name: str = "content") -> str:
    return "".join(c["choices"][0]["delta"].get(name) or "" for c in chunks if c.get("choices"))


@pytest.mark.parametrize("number", [1, 2])
async def test_max_tokens_end_a_reply_and_are_counted(cluster: Any, said: str, number: int) -> None:
    reply = await cluster.post({"max_tokens": TOKENS}, number=number)
    assert message(reply)["content"] == said
    assert reply.body["choices"][0]["finish_reason"] == "length"
    usage = reply.body["usage"]
    assert usage["completion_tokens"] == TOKENS and usage["total_tokens"] == usage["prompt_tokens"] + TOKENS
    short = await cluster.post({"max_completion_tokens": 3}, number=number)
    assert short.body["usage"]["completion_tokens"] == 3


async def test_a_stream_has_the_same_text_usage_and_an_end(cluster: Any, said: str) -> None:
    body = {"max_tokens": TOKENS, "stream": True, "stream_options": {"include_usage": True}}
    chunks = events(await cluster.post(body))
    assert text(chunks) == said
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["usage"]["completion_tokens"] == TOKENS


async def test_a_limit_of_the_node_holds_too(cluster: Any) -> None:
    for node in cluster.nodes:
        node.max_generate_tokens = 4
    assert (await cluster.post({"max_tokens": 1_000_000})).body["usage"]["completion_tokens"] == 4
    assert (await cluster.post({})).body["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_a_reply_without_being_shown_and_frees_its_caches(
    cluster: Any, said: str, stream: bool
) -> None:
    stop = said[5:8]
    reply = await cluster.post({"max_tokens": 60, "stop": [stop], "stream": stream})
    found = text(events(reply)) if stream else message(reply)["content"]
    assert found == said[: said.index(stop)]
    reason = events(reply)[-1]["choices"][0] if stream else reply.body["choices"][0]
    assert reason["finish_reason"] == "stop"
    await _quiet(cluster)


async def test_temperature_top_p_and_seed_choose_the_tokens(cluster: Any, said: str) -> None:
    async def ask(**options: Any) -> str:
        return str(message(await cluster.post({"max_tokens": TOKENS, **options}))["content"])

    hot = await ask(temperature=2.0, seed=1)
    assert hot != said and await ask(temperature=2.0, seed=1) == hot
    assert await ask(temperature=2.0, seed=2) != hot
    assert await ask(temperature=2.0, seed=1, top_p=1e-6) == said
    assert await ask(temperature=0) == said


async def test_a_request_without_a_temperature_takes_the_nodes(cluster: Any, said: str) -> None:
    for node in cluster.nodes:
        node.default_sample_temperature = 2.0
    assert message(await cluster.post({"max_tokens": TOKENS, "seed": 1}))["content"] != said


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("{", "not a JSON object"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "images"),
        ({"temperature": "warm"}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": -1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stop": {"a": 1}}, "stop"),
        ({"n": 2}, "'n'"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "forced"),
    ],
)
async def test_what_cannot_be_honoured_is_a_400_by_its_name(cluster: Any, body: Any, told: str) -> None:
    if isinstance(body, str):
        cluster.mains[0].api.default_model = "kimi"
    reply = await cluster.post(body)
    assert reply.status == 400 and told in reply.body["error"]["message"] == reply.body["detail"]
    assert not cluster.stages[0].loaded


async def test_other_models_and_unknown_names_go_where_exo_sends_them(cluster: Any) -> None:
    assert await cluster.post({"model": cluster.fake.OTHER}) == "exo's own answer"
    assert await cluster.post({"model": "unknown"}) == "exo's own answer"  # its default is another model
    cluster.mains[0].api.default_model = "kimi"
    assert (await cluster.post({"model": "unknown", "max_tokens": 2})).status == 200


async def test_a_prompt_that_is_too_long_is_told(cluster: Any) -> None:
    reply = await cluster.post({"messages": [{"role": "user", "content": "the sea " * 8192}]})
    assert reply.status == 503 and "longer than the plan" in reply.body["detail"]


async def test_a_failure_in_mid_stream_is_said_in_the_stream(cluster: Any) -> None:
    peer = cluster.nodes[0].peers[0]
    sends = peer.send_tensor

    async def breaks(*arguments: Any, **options: Any) -> None:
        peer.broken = len(peer.sent) >= 3
        await sends(*arguments, **options)

    peer.send_tensor = breaks
    *chunks, last = events(await cluster.post({"stream": True}))
    assert text(chunks) and "hung up" in last["error"]["message"]


async def test_a_client_that_leaves_ends_its_reply_on_every_node(cluster: Any) -> None:
    for node in cluster.nodes:
        node.max_generate_tokens = 2000
    reply = await cluster.post({"stream": True}, gone_after=5)
    assert reply.status == 500  # to nobody
    await _quiet(cluster)
    assert not cluster.mains[0].api.token_queues


async def test_reasoning_and_tool_calls_leave_in_their_own_fields(
    cluster: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speaker = Speaker.from_directory(tiny)
    special, encode = speaker.tokenizer.special, speaker.tokenizer.encode
    script = [
        *encode("Let me see."),
        special["<|tool_calls_section_begin|>"],
        special["<|tool_call_begin|>"],
        *encode("functions.get_weather:0"),
        special["<|tool_call_argument_begin|>"],
        *encode('{"city": "Oslo"}'),
        special["<|tool_call_end|>"],
        special["<|tool_calls_section_end|>"],
        special["<|im_end|>"],
    ]
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
    with _scripted(monkeypatch, script):
        whole = message(await cluster.post({"tools": tools}))
    assert whole["content"] == "Let me see."
    (call,) = whole["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Oslo"}'}
    assert call["id"] == "functions.get_weather:0"
    with _scripted(monkeypatch, script):
        chunks = events(await cluster.post({"tools": tools, "stream": True}))
    pieces = [piece for c in chunks for piece in c["choices"][0]["delta"].get("tool_calls", [])]
    assert pieces[0]["id"] == "functions.get_weather:0" and pieces[0]["function"]["name"] == "get_weather"
    assert "".join(piece["function"]["arguments"] for piece in pieces) == '{"city": "Oslo"}'
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    thinking = [*encode("<think>Hm.</think>Yes."), special["<|im_end|>"]]
    with _scripted(monkeypatch, thinking):
        told = message(await cluster.post({}))
    assert (told.get("reasoning_content"), told["content"]) in ((("Hm."), "Yes."), (None, "<think>Hm.</think>Yes."))


class TestAFrozenNode:
    @pytest.fixture(autouse=True)
    def _soon(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hook, "BEAT_S", 0.1)
        monkeypatch.setattr(hook, "SILENCE_S", 1.0)

    async def test_ends_what_waits_for_it_with_its_name_and_serves_again_when_it_is_back(
        self, cluster: Any, said: str
    ) -> None:
        for node in cluster.nodes:
            node.max_generate_tokens = 2000
            await node.start()
        assert message(await cluster.post({"max_tokens": TOKENS}))["content"] == said
        sent = cluster.nodes[0].peers[0].sent
        before = len(sent)
        stream = asyncio.create_task(cluster.post({"stream": True}))
        while len(sent) < before + 6:
            await asyncio.sleep(0.02)
        began = time.monotonic()
        _freeze(cluster, True)
        *chunks, last = events(await stream)
        assert "node2 is silent for" in last["error"]["message"] and text(chunks)
        assert time.monotonic() - began < 5
        reply = await cluster.post({"max_tokens": TOKENS, "stream": True})
        told = reply.body["detail"] if isinstance(reply, cluster.fake.JsonResponse) else events(reply)[-1]["error"]
        assert "node2 is silent" in str(told)
        _freeze(cluster, False)
        await asyncio.sleep(0.3)
        assert message(await cluster.post({"max_tokens": TOKENS}))["content"] == said
        _stop(cluster)

    async def test_a_node_that_was_frozen_itself_blames_nobody(self, cluster: Any, said: str) -> None:
        for node in cluster.nodes:
            await node.start()
        await asyncio.sleep(0.3)
        stream = asyncio.create_task(cluster.post({"max_tokens": 40, "stream": True}))
        await asyncio.sleep(0.2)
        time.sleep(2.5)  # the loop of both nodes stands still, which is the point
        assert "error" not in events(await stream)[-1]
        _stop(cluster)


def test_only_nodes_that_were_heard_can_fall_silent() -> None:
    now = [0.0]
    liveness = Liveness(lambda: now[0])
    now[0] = 100.0
    assert liveness.silent(30.0) is None
    liveness.hear("node2")
    now[0] = 131.0
    assert liveness.silent(30.0) == ("node2", 31.0)
    liveness.forgive()
    assert liveness.silent(30.0) is None


def test_the_longer_of_openais_two_names_for_the_limit_counts() -> None:
    message = {"role": "user", "content": "x"}
    read = read_chat({"messages": [message], "max_tokens": 5, "max_completion_tokens": 7}, temperature=0.0)
    assert read.conversation.max_tokens == 7 and read.conversation.sampling.temperature == 0.0


async def _quiet(cluster: Any) -> None:
    for _ in range(100):
        await asyncio.sleep(0.05)
        if not any(stage.sequences for stage in cluster.stages):
            break
    assert [stage.sequences for stage in cluster.stages] == [0, 0]
    assert not any(node.outstanding_requests for node in cluster.nodes)


@contextmanager
def _scripted(patch: pytest.MonkeyPatch, tokens: list[int]) -> Iterator[None]:
    """The model says these tokens, whatever its logits."""
    from exo_kimi.plugin.legacy import replies

    left = iter(tokens)

    def sample(logits: Any, samplers: Any, masks: Any) -> tuple[Sampled, ...]:
        assert np.isfinite(logits).all()
        token = next(left)
        samplers[0].accept(token)
        return (Sampled(seq_id=0, token_id=token),)

    with patch.context() as inner:
        inner.setattr(replies, "sample", sample)
        yield


def _freeze(cluster: Any, frozen: bool) -> None:
    """The second node hears nothing and says nothing."""
    for node in cluster.nodes:
        for peer in node.peers:
            peer.frozen = frozen


def _stop(cluster: Any) -> None:
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
