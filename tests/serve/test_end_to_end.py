"""The API over real stages: a tiny checkpoint, the real engine, and every conformance check."""

from __future__ import annotations

import asyncio
import json

import httpx
import openai
import pytest

from exo_kimi.bench.claims.conformance import CHECKS, TEMPLATE, Verdict, run_checks, summary, table
from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import resolve
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.runtime.engine.engine import Engine
from exo_kimi.runtime.loading.loader import load_stage
from exo_kimi.runtime.stage.inline import InlinePipeline
from exo_kimi.serve.app import create_app

LAYERS = 3
NARROW = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32}
ASK = [{"role": "user", "content": "Name three colours."}]


@pytest.fixture(scope="module")
def real(tmp_path_factory, make_voice, live_server):
    """A live server over two real stages in one thread, fp32."""
    directory = make_tiny(
        tmp_path_factory.mktemp("real") / "tiny",
        recipe="plain",
        dtype="F32",
        template=TEMPLATE,
        config={"num_hidden_layers": LAYERS, **NARROW},
    )
    voice = make_voice(directory)

    def load():
        index = open_index(directory)
        return [load_stage(resolve(index, start, end)) for start, end in ((0, 2), (2, LAYERS))]

    async def factory():
        pipeline = InlinePipeline(load, stages=2, context=8192, kv_capacity_tokens=16384, cache_step=64)
        engine = Engine(pipeline)
        await engine.start()
        await engine.wait_ready()
        app = create_app(engine, voice, model_id="tiny")
        return app, engine

    with live_server(factory) as server:
        yield server


def test_every_conformance_check_passes(real):
    verdicts = run_checks(real.url)
    assert [f"{verdict.check}: {verdict.reason}" for verdict in verdicts if not verdict.passed] == []
    assert len(verdicts) == len(CHECKS) > 60


def test_the_tables_have_a_line_for_each_check_and_area_and_count_them():
    columns = {
        "ours": [Verdict(check=check.name, reason="") for check in CHECKS],
        "theirs": [Verdict(check=check.name, reason="a | b\nc") for check in CHECKS],
    }
    lines = table(CHECKS, columns).splitlines()
    assert len(lines) == len(CHECKS) + 2
    assert all(line.count("|") - line.count("\\|") == 5 for line in lines)
    *areas, total = summary(CHECKS, columns).splitlines()[2:]
    assert [line.split("|")[1].strip() for line in areas] == list(dict.fromkeys(check.area for check in CHECKS))
    assert total == f"| all | {len(CHECKS)} | **{len(CHECKS)}** | **0** |"


def test_the_official_client_gets_typed_json_from_random_weights(real):
    schema = {
        "type": "object",
        "properties": {
            "sky": {"type": "string", "enum": ["blue", "grey"]},
            "clouds": {"type": "integer", "maximum": 9},
        },
        "required": ["sky", "clouds"],
        "additionalProperties": False,
    }
    client = openai.OpenAI(base_url=f"{real.url}/v1", api_key="none", max_retries=0)
    for seed in range(3):
        answer = client.chat.completions.create(
            model="tiny",
            messages=ASK,
            seed=seed,
            max_tokens=200,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "weather", "schema": schema, "strict": True},
            },
        )
        value = json.loads(answer.choices[0].message.content)
        assert value["sky"] in ("blue", "grey")
        assert value["clouds"] <= 9
        assert answer.choices[0].finish_reason == "stop"


async def test_sixty_four_requests_at_once_get_the_answers_that_they_get_alone(real):
    bodies = [
        {"messages": [{"role": "user", "content": f"Count to {number}."}], "max_tokens": 6, "temperature": 0}
        for number in range(4)
    ]
    url = f"{real.url}/v1/chat/completions"
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=64)) as client:

        async def ask(body):
            return (await client.post(url, json=body)).json()["choices"][0]["message"]["content"]

        alone = [await ask(body) for body in bodies]
        together = await asyncio.gather(*(ask(bodies[index % 4]) for index in range(64)))
    assert together == alone * 16


async def test_a_client_that_drops_a_stream_frees_its_memory(real):
    async with (
        httpx.AsyncClient() as client,
        client.stream(
            "POST",
            f"{real.url}/v1/chat/completions",
            json={"messages": ASK, "stream": True, "n": 3, "max_tokens": 5000},
        ) as response,
    ):
        lines = response.aiter_lines()
        for _ in range(10):
            await anext(lines)
        assert len(real.engine.snapshot().requests) == 3
        assert real.engine.snapshot().kv_reserved_tokens > 0
    async with asyncio.timeout(30):
        while real.engine.snapshot().kv_reserved_tokens:
            await asyncio.sleep(0.02)
    assert real.engine.snapshot().requests_cancelled_total >= 3


def test_the_engine_is_empty_after_all_that(real):
    snapshot = real.engine.snapshot()
    assert snapshot.requests == ()
    assert snapshot.kv_reserved_tokens == 0
