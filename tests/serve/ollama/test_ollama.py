"""Ollama's API: lines and whole answers, tools without ids, options, and what clients ask about the model."""

from __future__ import annotations

import json

import pytest

from exo_kimi.serve.ollama.contract import OllamaChatLine, OllamaErrorAnswer, OllamaGenerateLine, OllamaModelInfo
from exo_kimi.serve.ollama.request import OllamaChatRequest
from exo_kimi.serve.request.lenient import read_fields

ASK = {"model": "tiny-kimi", "messages": [{"role": "user", "content": "Hi"}]}
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    '{"city": "Oslo"}<|tool_call_end|><|tool_calls_section_end|>'
)


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


async def test_lines_add_up_to_the_whole_answer(saying, thinker, client_of):
    async with client_of(saying(f"Hm.</think>Hello.{CALL}", by=thinker)) as client:
        streamed = await client.post("/api/chat", json={**ASK, "tools": [WEATHER]})
        whole = (await client.post("/api/chat", json={**ASK, "tools": [WEATHER], "stream": False})).json()
    assert streamed.headers["content-type"] == "application/x-ndjson"
    found = lines(streamed.text)
    for each in [*found, whole]:
        assert OllamaChatLine.model_validate_json(json.dumps(each), strict=True)
    assert [each["done"] for each in found] == [False] * (len(found) - 1) + [True]
    message = whole["message"]
    assert "".join(each["message"]["content"] for each in found) == message["content"] == "Hello."
    assert "".join(each["message"].get("thinking", "") for each in found) == message["thinking"] == "Hm."
    calls = [call for each in found for call in each["message"].get("tool_calls", ())]
    assert calls == message["tool_calls"]
    assert calls[0]["function"] == {"index": 0, "name": "get_weather", "arguments": {"city": "Oslo"}}
    for key in ("done_reason", "prompt_eval_count", "eval_count"):
        assert found[-1][key] == whole[key]
    assert whole["eval_count"] > 0 and whole["done_reason"] == "stop"


async def test_results_find_their_calls_by_name_or_in_order(saying, client_of):
    def call(city):
        return {"function": {"name": "get_weather", "arguments": {"city": city}}}

    messages = [
        *ASK["messages"],
        {"role": "assistant", "content": "", "thinking": "Hm.", "tool_calls": [call("A"), call("B")]},
        {"role": "tool", "content": "1", "tool_name": "get_weather"},
        {"role": "tool", "content": "2"},
        {"role": "user", "content": "and?", "images": ["AAAA"]},
    ]
    engine = saying()
    async with client_of(engine) as client:
        answer = await client.post("/api/chat", json={**ASK, "messages": messages, "tools": [WEATHER], "stream": False})
    assert answer.status_code == 200, answer.text
    assert "image" in answer.json()["warnings"][0]
    said = read_fields(OllamaChatRequest, {**ASK, "messages": messages}).conversation().messages
    ids = [each["id"] for each in said[1]["tool_calls"]]
    assert [each["tool_call_id"] for each in said[2:4]] == ids and len(set(ids)) == 2
    assert said[1]["reasoning_content"] == "Hm."


async def test_generate_goes_on_from_a_prompt_and_loads_without_one(saying, client_of):
    engine = saying("Hello there.")
    async with client_of(engine) as client:
        answer = await client.post("/api/generate", json={"model": "tiny-kimi:latest", "prompt": "Hi", "stream": False})
        assert OllamaGenerateLine.model_validate_json(answer.text, strict=True).response == "Hello there."
        raw = {"model": "tiny-kimi", "prompt": "Once upon", "raw": True, "stream": False}
        assert (await client.post("/api/generate", json=raw)).json()["response"].startswith("Hello there.")
        assert engine.requests[1].prompt_ids == tuple(engine.voice.tokenizer.encode("Once upon"))
        for path, body in (("/api/generate", {}), ("/api/chat", {"messages": []})):
            loaded = (await client.post(path, json={"model": "tiny-kimi", **body})).json()
            assert (loaded["done"], loaded["done_reason"]) == (True, "load")
    assert len(engine.requests) == 2


async def test_options_are_carried_out_or_named(saying, client_of):
    engine = saying("Hello STOP there.")
    options = {
        "num_predict": 50,
        "temperature": 0,
        "top_k": 5,
        "seed": 3,
        "repeat_penalty": 1.1,
        "stop": ["STOP"],
        "num_ctx": 2048,
    }
    async with client_of(engine) as client:
        answer = (
            await client.post("/api/chat", json={**ASK, "options": options, "stream": False, "keep_alive": "5m"})
        ).json()
        assert answer["message"]["content"] == "Hello " and "warnings" not in answer
        request = engine.requests[0]
        assert (request.max_tokens, request.sampling.top_k, request.sampling.seed) == (50, 5, 3)
        assert (request.sampling.temperature, request.sampling.repetition_penalty) == (0, 1.1)
        endless = {**ASK, "options": {"num_predict": -1, "mirostat": 2, "new": 1}, "stream": False}
        told = " ".join((await client.post("/api/chat", json=endless)).json()["warnings"])
        assert engine.requests[1].max_tokens is None
        assert "options.mirostat" in told and "options.new" in told


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400),
        ({"model": "other"}, 404),
        ({"messages": ["Hi"]}, 400),
        ({"messages": [{"role": "king"}]}, 400),
        ({"tools": [{"type": "function"}]}, 400),
        ({"options": {"temperature": "hot"}}, 400),
        ({"options": {"stop": [""]}}, 400),
        ({"format": "xml"}, 400),
    ],
)
async def test_a_refusal_is_one_line(saying, client_of, body, status):
    async with client_of(saying()) as client:
        answer = await client.post("/api/chat", json={**ASK, **body} if body else {})
        assert answer.status_code == status
        assert OllamaErrorAnswer.model_validate_json(answer.text, strict=True).model_dump() == answer.json()


async def test_a_fault_in_the_stream_and_a_silence_are_lines(saying, client_of):
    async with client_of(saying(break_at=3, first_delay_s=0.2), ping_interval_s=0.03) as client:
        found = lines((await client.post("/api/chat", json=ASK)).text)
    assert "stage 1 died" in found[-1]["error"]
    assert all(each["message"]["content"] == "" for each in found[:4])


async def test_what_clients_ask_about_the_model(saying, thinker, client_of):
    async with client_of(saying(by=thinker), further_names=["k2"]) as client:
        assert [each["name"] for each in (await client.get("/api/tags")).json()["models"]] == ["tiny-kimi", "k2"]
        assert (await client.get("/api/ps")).json()["models"][0]["context_length"] == 4096
        assert (await client.get("/api/version")).json()["version"]
        shown = await client.post("/api/show", json={"name": "k2:latest"})
        assert OllamaModelInfo.model_validate_json(shown.text, strict=True)
        assert shown.json()["capabilities"] == ["completion", "tools", "thinking"]
        assert shown.json()["model_info"]["kimi-k2.context_length"] == 4096
        assert (await client.post("/api/show", json={"model": "other"})).status_code == 404
