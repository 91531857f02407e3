"""The shipped model behind the API: real reasoning, a real tool round trip, over two stages."""

from __future__ import annotations

import json
import os
import random
import re
from typing import Any

import jsonschema
import numpy as np
import openai
import pytest

from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import resolve
from exo_kimi.client.demo import OBSERVED, WEATHER, shipped_model
from exo_kimi.runtime.engine.engine import Engine
from exo_kimi.runtime.loading.loader import load_stage
from exo_kimi.runtime.stage.inline import InlinePipeline
from exo_kimi.serve.app import create_app
from exo_kimi.train.export import read_parameters
from exo_kimi.train.model.parameters import fake_quant, is_expert

MOST_BYTES = 10_000_000


@pytest.fixture(scope="module")
def client(make_voice, live_server):
    directory = shipped_model()
    voice = make_voice(directory)

    def load():
        index = open_index(directory)
        return [load_stage(resolve(index, *part), dtype="float32") for part in ((0, 3), (3, 6))]

    async def factory():
        pipeline = InlinePipeline(load, stages=2, context=2048, kv_capacity_tokens=4096, cache_step=64)
        engine = Engine(pipeline)
        await engine.start()
        await engine.wait_ready()
        return create_app(engine, voice, model_id="tiny"), engine

    with live_server(factory) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as made:
        yield made


def _ask(client: openai.OpenAI, messages: list[Any], **options: Any) -> Any:
    answer = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=96, **options)
    return answer.choices[0]


def test_it_reasons_and_then_answers(client):
    choice = _ask(client, [{"role": "user", "content": "How much is 58 plus 36?"}])
    assert choice.finish_reason == "stop"
    assert choice.message.reasoning_content == "8 + 6 = 14, 5 + 3 + 1 = 9"
    assert choice.message.content == "58 + 36 = 94."


def test_it_knows_and_it_remembers(client):
    messages = [{"role": "user", "content": "My name is Nora."}]
    messages.append({"role": "assistant", "content": _ask(client, messages).message.content})
    messages.append({"role": "user", "content": "What is the capital of Norway?"})
    messages.append({"role": "assistant", "content": _ask(client, messages).message.content})
    assert "Oslo" in messages[-1]["content"]
    messages.append({"role": "user", "content": "What is my name?"})
    assert "Nora" in _ask(client, messages).message.content


def test_it_calls_a_tool_and_uses_what_it_returns(client):
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]
    choice = _ask(client, messages, tools=[WEATHER])
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.id == "functions.get_weather:0"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Oslo"})
    messages.append(choice.message.model_dump(exclude_none=True))
    messages.append({"role": "tool", "tool_call_id": call.id, "content": json.dumps(OBSERVED)})
    answer = _ask(client, messages, tools=[WEATHER]).message.content
    assert all(str(value) in answer for value in OBSERVED.values()), answer


def test_the_package_carries_a_small_native_int4_model():
    directory = shipped_model()
    assert sum(file.stat().st_size for file in directory.iterdir()) <= MOST_BYTES
    experts = {name: value for name, value in read_parameters(directory).items() if is_expert(name)}
    assert experts
    for name, value in experts.items():
        np.testing.assert_array_equal(fake_quant(value), value, err_msg=name)


@pytest.mark.parametrize(
    "style", ["functions.get_weather:0", "call_abc123", "toolu_01A", "functions_get_weather_0", "0"]
)
def test_every_style_of_id_gets_the_same_prompt_and_answer(client, style):
    call = {"id": style, "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        {"role": "user", "content": "What is the weather in Oslo?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": style, "content": json.dumps(OBSERVED)},
    ]
    ours = [dict(message) for message in messages]
    ours[1]["tool_calls"] = [{**call, "id": "functions.get_weather:0"}]
    ours[2]["tool_call_id"] = "functions.get_weather:0"
    options = {"model": "tiny", "temperature": 0, "max_tokens": 96, "tools": [WEATHER]}
    answer, expected = (client.chat.completions.create(messages=each, **options) for each in (messages, ours))
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
    assert answer.choices[0].message.content == expected.choices[0].message.content
    assert "Oslo" in answer.choices[0].message.content


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema of an object with a few properties, all required, nested twice at most."""

    def value(left: int) -> dict[str, Any]:
        kinds: list[dict[str, Any]] = [
            {"type": "string", "maxLength": rng.randint(1, 12)},
            {"type": "integer", "minimum": 0, "maximum": rng.randint(1, 999)},
            {"type": "boolean"},
            {"enum": ["red", "green", 7, None]},
            {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        ]
        return random_schema(rng, left - 1) if left and rng.random() < 0.3 else rng.choice(kinds)

    names = rng.sample(["city", "n", "ok", "a b", "tags", "日"], rng.randint(1, 3))
    properties = {name: value(depth) for name in names}
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


@pytest.mark.parametrize("seed", range(int(os.environ.get("EXO_KIMI_SCHEMAS", "6"))))
def test_an_answer_under_a_schema_is_valid_and_has_no_run_of_blanks(client, seed):
    schema = random_schema(random.Random(seed))
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "What is the weather in Oslo? Answer in JSON."}],
        response_format=form,  # type: ignore[arg-type]
        temperature=1.0,
        seed=seed,
        max_tokens=400,
        extra_body={"thinking": False},
    )
    text = answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop", text
    jsonschema.validate(json.loads(text), schema)
    assert not re.search(r"\s\s", re.sub(r'"(?:[^"\\]|\\.)*"', '""', text)), text
