"""Whatever arrives over HTTP or from a stage, from exo, or in a plan is an answer below 500, a value, or one of our errors."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import strategies as st

from exo_kimi.chat.constraint import json_schema
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.errors import ExoKimiError, ProtocolError
from exo_kimi.planner.command import plan_answer
from exo_kimi.planner.machines.cluster import read_cluster
from exo_kimi.planner.plan import Plan
from exo_kimi.plugin.control.state import parse_state
from exo_kimi.runtime.protocol import frames as wire
from exo_kimi.runtime.protocol import messages
from exo_kimi.runtime.requests import TokenEvent
from exo_kimi.runtime.transport.address import parse_address
from exo_kimi.runtime.transport.keys import ClusterKey
from exo_kimi.serve.app import create_app

pytestmark = pytest.mark.fuzz
TESTS = Path(__file__).parents[1]
SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "string", "pattern": "^[a-z]+$", "maxLength": 9},
        "b": {"type": "array", "items": {"$ref": "#/$defs/n"}},
    },
    "required": ["a"],
    "additionalProperties": False,
    "$defs": {"n": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 99}, {"enum": [1, "x", None]}]}},
}
TOOL = {"type": "function", "function": {"name": "find", "description": "d", "strict": True, "parameters": SCHEMA}}
TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "you"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "functions.find:0", "type": "function", "function": {"name": "find", "arguments": "{}"}}],
    },
    {"role": "tool", "tool_call_id": "functions.find:0", "content": "found"},
]
BODIES: dict[str, list[Any]] = {
    "/v1/chat/completions": [
        {
            "messages": TURNS,
            "tools": [TOOL],
            "tool_choice": "auto",
            "stream": True,
            "stream_options": {"include_usage": True},
            "n": 2,
        },
        {
            "messages": TURNS[:2],
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}},
            "max_tokens": 4,
        },
        {
            "messages": TURNS[1:2],
            "stop": ["a", "b"],
            "logit_bias": {"300": 1},
            "logprobs": True,
            "top_logprobs": 2,
            "seed": 1,
            "temperature": 0.5,
            "top_p": 0.9,
        },
    ],
    "/v1/completions": [
        {"prompt": ["a", "b"], "echo": True, "n": 2, "max_tokens": 3},
        {"prompt": [[300, 301], [302]], "logprobs": 2, "stop": "x"},
    ],
    "/v1/responses": [
        {"input": "Hi", "instructions": "x", "max_output_tokens": 16},
        {
            "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}],
            "tools": [{"type": "function", "name": "find", "parameters": SCHEMA}],
        },
    ],
    "/v1/messages": [
        {
            "model": "tiny-kimi",
            "max_tokens": 9,
            "system": "x",
            "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
            "tools": [{"name": "find", "input_schema": SCHEMA}],
        }
    ],
}


def sibling(path: str) -> Any:
    """A module of another folder of the tests, which are no package."""
    name = f"fuzz_{Path(path).stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, TESTS / path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("fuzz") / "tiny", template="instruct")


@pytest.mark.parametrize("path", BODIES)
def test_http_bodies(fuzz: Any, tiny: Path, path: str) -> None:
    serving = sibling("serve/conftest.py")
    voice = serving.voice_of(tiny)
    engine = serving.ScriptedEngine(voice=voice, script=lambda request: [])
    engine._event = lambda request, token: TokenEvent(token_id=token)  # it ends at once, whatever the grammar wants
    app = create_app(engine, voice, model_id="tiny-kimi")

    def check(body: bytes) -> None:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(app, raise_app_exceptions=True)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.post(path, content=body, headers={"content-type": "application/json"}, timeout=60)

        answer = asyncio.run(ask())
        assert answer.status_code < 500, (answer.text, body)
        if answer.headers["content-type"].startswith("application/json"):
            answer.json()

    words = sorted(
        {key for seed in BODIES[path] for key in seed} | {"tools", "stop", "metadata", "functions", "reasoning_effort"}
    )
    fuzz.run(fuzz.texts(BODIES[path], words), check, few=60)


def test_schemas(fuzz: Any, tiny: Path) -> None:
    tokenizer = Speaker.from_directory(tiny).tokenizer
    words = [
        "$ref",
        "allOf",
        "oneOf",
        "not",
        "patternProperties",
        "minItems",
        "maxItems",
        "maxLength",
        "format",
        "const",
        "multipleOf",
        "prefixItems",
    ]

    def check(schema: Any) -> None:
        try:
            json_schema(tokenizer, schema).mask()
        except ExoKimiError as error:
            str(error).encode("utf-8", "backslashreplace")

    fuzz.run(fuzz.values([SCHEMA], words), check)


def test_frames_of_stages(fuzz: Any) -> None:
    kinds = [*sorted(messages.CONTROL_KINDS), "step", "step_result"]
    strategies = sibling("runtime/protocol/test_frames.py")

    def check(parts: list[bytes]) -> None:
        try:
            wire.decode(parts)
        except ProtocolError as error:
            assert len(str(error)) < 2000

    @st.composite
    def damaged(draw: st.DrawFn) -> list[bytes]:
        parts = [
            bytes(part) for part in wire.encode(draw(strategies.steps() | strategies.results() | strategies.controls()))
        ]
        header = json.loads(parts[0])
        if draw(st.booleans()):
            parts[0] = draw(fuzz.texts([header, {**header, "kind": draw(st.sampled_from(kinds))}]))
        which = draw(st.integers(0, len(parts) - 1))
        if which:
            parts[which] = draw(fuzz.bytes([parts[which]]))
        return parts

    fuzz.run(damaged(), check)


def test_plans(fuzz: Any, tiny: Path) -> None:
    plan = json.loads(plan_answer(directory=tiny, cluster="2x m1-max-64", context=256).plan.to_json())

    def check(text: bytes) -> None:
        try:
            Plan.from_json(text.decode("utf-8", "replace"))
        except ExoKimiError as error:
            str(error).encode("utf-8", "backslashreplace")

    fuzz.run(fuzz.texts([plan]), check)


@pytest.mark.parametrize("older", [False, True])
def test_states_of_exo(fuzz: Any, older: bool) -> None:
    fake = sibling("plugin/fake_exo.py")
    nodes = [
        fake.FakeNode(node_id=name * 32, name=name, ip=f"169.254.1.{ord(name)}", has={"lab/kimi-k2-tiny"})
        for name in "ab"
    ]
    state = fake.FakeExo(nodes=nodes, older=older)._snapshot()
    shards = {
        "r0": {
            "PipelineShardMetadata": {
                "deviceRank": 0,
                "startLayer": 0,
                "endLayer": 7,
                "modelCard": {"modelId": "lab/kimi-k2-tiny"},
            }
        }
    }
    assigned = {"modelId": "lab/kimi-k2-tiny", "nodeToRunner": {"a" * 32: "r0"}, "runnerToShard": shards}
    state["instances"] = {"i": {"MlxRingInstance": {"instanceId": "i", "shardAssignments": assigned}}}
    state["runners"] = {"r0": {"RunnerLoading": {"layersLoaded": 1, "totalLayers": 7}}}

    def check(value: Any) -> None:
        try:
            read = parse_state(json.loads(json.dumps(value)), where="http://x")
        except ExoKimiError as error:
            str(error).encode("utf-8", "backslashreplace")
        else:
            _ = read.names

    fuzz.run(fuzz.values([state]), check)


def test_addresses_keys_and_clusters(fuzz: Any, tmp_path: Path) -> None:
    toml = b'link = "10GbE"\n[[machine]]\nname = "a"\nchip = "m1-max-64"\nmemory = "64 GB"\n'
    toml += b'[[link]]\nbetween = ["a", "b"]\nkind = "tb4"\n'
    file = tmp_path / "cluster.toml"

    def check(data: bytes) -> None:
        text = data.decode("utf-8", "surrogateescape")
        file.write_bytes(data)
        for read in (
            lambda: parse_address(text, option="--stage"),
            lambda: parse_address(text, option="--listen", listen=True),
            lambda: ClusterKey.from_text(text, where="x"),
            lambda: read_cluster(str(file)),
            lambda: read_cluster(text),
        ):
            try:
                read()
            except ExoKimiError as error:
                str(error).encode("utf-8", "backslashreplace")

    seeds = [
        b"tcp://127.0.0.1:52500",
        b"[::1]:99",
        b"ipc:///tmp/x",
        b"studio.local:1",
        b"2x m1-max-64, mac-mini",
        ClusterKey.generate().secret,
        toml,
    ]
    fuzz.run(fuzz.bytes(seeds), check)
