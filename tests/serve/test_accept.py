"""What agents really send: answered, carried out as far as it can be, and the rest named."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from exo_kimi.chat.template import ChatTemplate
from exo_kimi.checkpoint.rendering.template import CompiledTemplate
from exo_kimi.serve.request.schemas import parse_chat

CHAT = "/v1/chat/completions"
ASK = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "found"}


def calling(**more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [CALL], **more}


async def answered(client_of: Any, engine: Any, **fields: Any) -> tuple[dict[str, Any], str]:
    """The answer to a request, which must be one, and the prompt that the engine got last."""
    async with client_of(engine) as client:
        response = await client.post(CHAT, json={"messages": ASK, **fields})
    assert response.status_code == 200, response.text
    return response.json(), engine.voice.tokenizer.decode(engine.requests[-1].prompt_ids)


FIELDS: list[dict[str, Any]] = [
    *({"reasoning_effort": effort} for effort in ("none", "minimal", "low", "medium", "high", "xhigh", "max")),
    {"reasoning": {"effort": "medium", "summary": "auto"}},
    {"reasoning": {"max_tokens": 100, "enabled": True, "exclude": False}},
    {"thinking": {"type": "adaptive"}},
    {"thinking": {"type": "enabled", "budget_tokens": 1024}},
    {"thinking": {"type": "enabled", "keep": "all", "effort": "high"}},
    {"thinking": {"type": "disabled", "keep": "none"}},
    *({"thinking": word} for word in ("enabled", "disabled", "true", "auto", True, False)),
    {"chat_template_kwargs": {"thinking": True, "enable_thinking": True, "preserve_thinking": True, "mood": 1}},
    {"enable_thinking": False},
    {"think": "high"},
    {"thinking_budget": 5},
    {"verbosity": "low"},
    {"store": True, "metadata": {"a": "b"}, "user": "u", "service_tier": "flex", "prompt_cache_key": "k"},
    {"safety_identifier": "s", "prompt_cache_retention": "24h"},
    {"stream_options": {"include_usage": True}},
    {"cache_control": {"type": "ephemeral"}},
    {"num_ctx": 4096, "keep_alive": "5m", "cache_prompt": True, "id_slot": 1, "options": {"num_gpu": 1}},
    {"parallel_tool_calls": True},
    {"tools": [], "tool_choice": "auto", "parallel_tool_calls": False},
    {"tools": [{**TOOL, "cache_control": {"type": "ephemeral"}}]},
    {"tools": [{"type": "function", "function": {"name": "mcp/" + "n" * 124, "parameters": {}}}]},
    {"tools": [TOOL], "tool_choice": {"type": "auto"}},
    {"max_tokens": 5, "max_completion_tokens": 6},
    {"messages": [*ASK, {"role": "assistant", "content": "So", "partial": True, "name": "bard"}]},
    {"messages": [*ASK, {"role": "assistant", "content": "So"}], "continue_final_message": True},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]}
        ]
    },
]


@pytest.mark.parametrize("fields", FIELDS, ids=lambda fields: json.dumps(fields)[:60])
async def test_no_field_of_an_agent_is_a_400(saying, client_of, thinker, fields):
    for engine in (saying("ok"), saying("hm</think>ok", by=thinker)):
        answer, _ = await answered(client_of, engine, **fields)
        assert answer["choices"][0]["message"]["content"].endswith("ok")


HISTORIES: dict[str, list[dict[str, Any]]] = {
    "an interrupted turn": [{"role": "assistant", "content": None}],
    "an empty list": [{"role": "assistant", "content": []}],
    "a result without content": [calling(), {**RESULT, "content": None}],
    "a result that is JSON": [calling(), {**RESULT, "content": {"sky": "rain", "n": [1]}}],
    "a result that is a list": [calling(), {**RESULT, "content": ["a", 1]}],
    "a result that is a number": [calling(), {**RESULT, "content": 7}],
    "a result with a file": [calling(), {**RESULT, "content": [{"type": "file", "file": {"file_id": "f"}}]}],
    "a result with half a part": [calling(), {**RESULT, "content": [{"type": "text"}]}],
    "arguments as an object": [
        {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "look", "arguments": {"a": 1}}}]},
        RESULT,
    ],
    "arguments of null": [
        {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "look", "arguments": None}}]},
        RESULT,
    ],
    "what the openai client parsed": [
        calling(
            parsed=None,
            refusal=None,
            audio=None,
            annotations=[],
            tool_calls=[{**CALL, "function": {**CALL["function"], "parsed_arguments": {"a": 1}}}],  # type: ignore[dict-item]
        ),
        RESULT,
    ],
    "what other servers add": [calling(reasoning="hm", reasoning_details=[{"type": "x"}], provider="p"), RESULT],
    "the first form of calls": [
        {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": "{}"}},
        {"role": "function", "name": "look", "content": "found"},
    ],
    "free text tools": [
        {"role": "assistant", "tool_calls": [{"id": "c", "type": "custom", "custom": {"name": "patch", "input": "x"}}]},
        {**RESULT, "tool_call_id": "c"},
    ],
}


@pytest.mark.parametrize("name", HISTORIES)
async def test_a_history_is_never_refused(saying, client_of, name):
    _, prompt = await answered(client_of, saying("ok"), messages=[*ASK, *HISTORIES[name], *ASK])
    assert prompt.count("Hi") == 2
    assert "None" not in prompt and "call_1" not in prompt


async def test_json_in_a_history_is_its_text(saying, client_of):
    _, prompt = await answered(client_of, saying("ok"), messages=[*ASK, *HISTORIES["a result that is JSON"]])
    assert prompt.rstrip().endswith('{"sky": "rain", "n": [1]}<|im_end|><|im_assistant|>assistant<|im_middle|>')
    _, prompt = await answered(client_of, saying("ok"), messages=[*ASK, *HISTORIES["arguments as an object"]])
    assert '<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|>' in prompt


async def test_reasoning_counts_under_either_name(saying, client_of, thinker):
    engine = saying("ok", by=thinker)
    for name in ("reasoning", "reasoning_content"):
        _, prompt = await answered(client_of, engine, messages=[*ASK, calling(**{name: "let me look"}), RESULT])
        assert "<think>let me look</think>" in prompt


async def test_what_is_not_carried_out_is_named_once_with_its_place(saying, client_of):
    history = HISTORIES["what other servers add"]
    fields = {"verbosity": "low", "num_ctx": 9, "messages": [*ASK, *history, *history, *ASK]}
    answer, _ = await answered(client_of, saying("ok"), **fields)
    (told,) = answer["warnings"]
    for name in ("verbosity", "num_ctx", "messages[].reasoning_details", "messages[].provider"):
        assert told.count(name) == 1


async def test_kept_reasoning_is_in_the_prompt_where_the_template_can(saying, client_of, thinker):
    k26 = replace(thinker, template=ChatTemplate.built_in("k25", thinker.tokenizer))
    messages = [*ASK, {"role": "assistant", "content": "Yes.", "reasoning_content": "be nice"}, *ASK]
    for keep in (
        {"thinking": {"type": "enabled", "keep": "all"}},
        {"chat_template_kwargs": {"preserve_thinking": True}},
    ):
        _, prompt = await answered(client_of, saying("ok", by=k26), messages=messages, **keep)
        assert "<think>be nice</think>Yes." in prompt
        answer, _ = await answered(client_of, saying("ok"), messages=messages, **keep)
        assert any("not kept" in told for told in answer["warnings"])
    _, prompt = await answered(client_of, saying("ok", by=k26), messages=messages)
    assert "be nice" not in prompt


async def test_a_partial_message_is_gone_on_with(saying, client_of, thinker):
    begun = {"role": "assistant", "content": "Once upon", "partial": True, "name": "bard"}
    for engine in (saying(" a time"), saying(" a time", by=thinker)):
        answer, prompt = await answered(client_of, engine, messages=[*ASK, begun])
        assert prompt.endswith("Once upon")
        assert ("<|im_assistant|>bard<|im_middle|><think></think>Once" in prompt) == (engine.voice is thinker)
        assert answer["choices"][0]["message"]["content"] == " a time"
        async with client_of(engine) as client:
            for wrong in ({**begun, "role": "user"}, {**begun, "tool_calls": [CALL]}):
                assert (await client.post(CHAT, json={"messages": [*ASK, wrong]})).status_code == 400
            assert (await client.post(CHAT, json={"messages": [begun, *ASK]})).status_code == 400


@pytest.mark.parametrize(
    "fields",
    [
        {"thinking": {"type": "enabled", "budget_tokens": 3}},
        {"thinking_budget": 3},
        {"reasoning": {"max_tokens": 3}},
        {"chat_template_kwargs": {"thinking_budget": 3}},
    ],
)
def test_a_budget_is_read_from_every_place(fields):
    request = parse_chat({"messages": ASK, **fields})
    assert request.reasoning_budget == 3


async def test_an_effort_is_the_templates_or_a_cap(saying, client_of, thinker):
    levels = CompiledTemplate("{{ thinking_effort }}<|im_end|><think>", "test")
    for effort, cap in (("low", 2048), ("max", None)):
        for field in ({"reasoning_effort": effort}, {"thinking": {"type": "enabled", "effort": effort}}):
            engine = saying("hm</think>ok", by=thinker)
            answer, _ = await answered(client_of, engine, **field)
            assert (engine.requests[0].constraint is not None) == (cap is not None)
            assert any(str(cap) in told for told in answer.get("warnings", ())) == (cap is not None)
            engine = saying("hm</think>ok", by=replace(thinker, template=ChatTemplate(thinker.tokenizer, levels)))
            answer, prompt = await answered(client_of, engine, **field)
            assert prompt.startswith(effort)
            assert (engine.requests[0].constraint, answer.get("warnings")) == (None, None)


async def test_a_budget_caps_the_reasoning_on_every_door(saying, client_of, thinker):
    engine = saying("hm</think>ok", by=thinker)
    async with client_of(engine) as client:
        budget = {"type": "enabled", "budget_tokens": 1024}
        body = {"model": "tiny-kimi", "max_tokens": 99, "messages": ASK, "thinking": budget}
        assert (await client.post("/v1/messages", json=body)).status_code == 200
        for effort in ("low", "high"):
            asked = {"model": "tiny-kimi", "input": "Hi", "reasoning": {"effort": effort}}
            assert (await client.post("/v1/responses", json=asked)).status_code == 200
    assert [request.constraint is not None for request in engine.requests] == [True, True, False]


def test_wishes_that_contradict_each_other_are_settled_and_named():
    request = parse_chat({"messages": ASK, "thinking": {"type": "disabled"}, "reasoning_effort": "high"})
    assert request.wants_thinking() is False
    assert any("reasoning_effort contradicts thinking" in told for told in request.warnings)


GAINED = {"role": "system", "content": "", "tools": [TOOL]}


async def test_tools_that_a_conversation_gains_are_declared_and_callable(saying, client_of, voice):
    engine = saying(
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>{}"
        "<|tool_call_end|><|tool_calls_section_end|>"
    )
    for choice in ("auto", "required"):
        answer, prompt = await answered(client_of, engine, messages=[*ASK, GAINED, *ASK], tool_choice=choice)
        assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "look"
        assert '"name": "look"' in prompt and "<|im_system|>system<|im_middle|><|im_end|>" not in prompt
        assert "declared at the begin" in answer["warnings"][0]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "x", "tools": [TOOL]},
        {"role": "system", "content": "x", "tools": [TOOL]},
        {"role": "system", "content": "", "tools": [TOOL, TOOL]},
        {"role": "system", "content": "", "tools": {"type": "function"}},
        {"role": "system", "content": "", "tools": [None]},
        {"role": "system", "content": "", "tools": [{"type": "function", "function": {"name": "1st"}}]},
    ],
)
async def test_tools_in_a_message_that_mean_nothing_are_refused(saying, client_of, message):
    async with client_of(saying()) as client:
        assert (await client.post(CHAT, json={"messages": [message, *ASK]})).status_code == 400


HARD = {
    "type": "object",
    "properties": {
        "path": {"type": "string", "format": "path"},
        "tags": {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
        "word": {"type": "string", "pattern": "^(?!no).*$"},
    },
}


@pytest.mark.parametrize("strict", [None, False, True])
@pytest.mark.parametrize("choice", ["auto", "required"])
async def test_one_tool_with_a_hard_schema_does_not_stop_the_others(saying, client_of, strict, choice):
    hard = {"type": "function", "function": {"name": "hard", "parameters": HARD, "strict": strict}}
    engine = saying(
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>{}"
        "<|tool_call_end|><|tool_calls_section_end|>"
    )
    answer, _ = await answered(client_of, engine, tools=[hard, TOOL], tool_choice=choice)
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    enforced = strict or choice == "required"
    assert any("tools[0].function.parameters" in told for told in answer.get("warnings", ())) == enforced
    async with client_of(engine, strict_api=True) as client:
        response = await client.post(CHAT, json={"messages": ASK, "tools": [hard, TOOL], "tool_choice": choice})
    assert response.status_code == (400 if strict else 200)
