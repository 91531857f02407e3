"""Moonshot's own verifier (MoonshotAI/Kimi-Vendor-Verifier), offline, against our server over a scripted model.

    KIMI_VERIFIER_SRC=CHECKOUT KIMI_VERIFIER_PYTHON=PYTHON pytest tests/serve/test_verifier.py

PYTHON has pytest, pytest-rerunfailures, openai, httpx and jsonschema. The model says what a good one would: it reads the prompt
for what the suite asks, and where a grammar forbids that, it writes any token that the grammar allows.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exo_kimi.chat.template import ChatTemplate
from exo_kimi.checkpoint.rendering.template import CompiledTemplate
from exo_kimi.runtime.requests import GenerationRequest, TokenEvent
from exo_kimi.serve.app import create_app

SOURCE, PYTHON = os.environ.get("KIMI_VERIFIER_SRC"), os.environ.get("KIMI_VERIFIER_PYTHON", "")
MODEL = "kimi"
# The suite's own count of prompt tokens, with the hosted K3's tokenizer and template, which a K2 does not have.
HOSTED_ONLY = ("prompt_tokens_without", "test_response_format_with")

pytestmark = [
    pytest.mark.skipif(SOURCE is None, reason="needs a checkout of Moonshot's verifier (KIMI_VERIFIER_SRC)"),
    pytest.mark.timeout(580),
]


class ObedientEngine:
    """Says a wished text as far as the constraint allows, else what it allows that ends soonest."""

    def __init__(self, voice: Any) -> None:
        self.voice = voice
        tokenizer = voice.tokenizer
        self._end = tokenizer.special["<|im_end|>"]
        self._closing = [tokenizer.special[name] for name in ("</think>", "<|tool_calls_section_end|>")]
        self._closing += [tokenizer.encode(char)[0] for char in '"}]']

    def check(self, request: GenerationRequest) -> int | None:
        return request.max_tokens

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        prompt = self.voice.tokenizer.decode(request.prompt_ids)
        wished = deque(self._wish(prompt))
        rng = np.random.default_rng(7)
        for count in range(1, (request.max_tokens or 20_000) + 1):
            token = self._next(request, wished, count, rng)
            if request.constraint is not None:
                request.constraint.accept(token)
            if token == self._end or count == request.max_tokens:
                yield TokenEvent(token_id=token, finish_reason="stop" if token == self._end else "length")
                return
            yield TokenEvent(token_id=token)
            if count % 64 == 0:
                await asyncio.sleep(0)

    def _next(self, request: GenerationRequest, wished: deque[int], count: int, rng: np.random.Generator) -> int:
        mask = request.constraint.mask() if request.constraint is not None else None
        if mask is None:
            return wished.popleft() if wished else self._end
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little"))
        if wished and wished[0] in allowed:
            return wished.popleft()
        wished.clear()
        for token in (self._end, *(self._closing if count % 3 else ())):
            if token in allowed:
                return int(token)
        return int(rng.choice(allowed))

    def _wish(self, prompt: str) -> Iterator[int]:
        question = prompt.rsplit("<|im_user|>", 1)[-1]
        thinks = prompt.endswith("<think>")
        effort = re.findall("effort: ([a-z]+)", prompt)[0]
        long = "逐步推理" in question and effort != "low"
        reasoning = ("so " * 500 if long else "Let me see.") + "</think>" if thinks else ""
        names = re.findall(r"type (\w+) = \(|\"name\": ?\"(\w+)\"", prompt)
        names = [one or two for one, two in names]
        calls = "不应使用" not in question and ("get_weather" in names)
        if "thinking_effort" in question:
            text = effort
        elif calls:
            call = '<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{"city": "Beijing"}<|tool_call_end|>'
            text = f"<|tool_calls_section_begin|>{call}<|tool_calls_section_end|>"
        elif "JSON" in question and "schema" not in question.lower():
            text = '{"city": "Beijing", "capital": true}'
        elif "JSON" in question:
            text = '{"city": "Beijing", "temperature": 21}'
        else:
            text = "Hello, I am Kimi."
        return iter(self.voice.ids(reasoning + text))

    def snapshot(self) -> Any:
        raise NotImplementedError

    async def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def url(live_server, tmp_path_factory, make_voice, thinker) -> Iterator[str]:
    # A K3's template tells the model its effort; a K2's has none, and the effort is a cap.
    told = "{{ system('system', 'effort: ' ~ (thinking_effort or 'max')) }}"
    folder = resources.files("exo_kimi.chat").joinpath("templates")
    source = "".join(folder.joinpath(name).read_text(encoding="utf-8") for name in ("macros.jinja", "k25.jinja"))
    source = source.replace("{%- if add_generation_prompt", told + "{%- if add_generation_prompt")
    voice = replace(thinker, template=ChatTemplate(thinker.tokenizer, CompiledTemplate(source, "test")))

    async def make() -> Any:
        engine = ObedientEngine(voice)
        scripted = _with_snapshot(engine, voice)
        return create_app(scripted, voice, model_id=MODEL), scripted

    with live_server(make) as server:
        yield f"{server.url}/v1"


def _with_snapshot(engine: ObedientEngine, voice: Any) -> Any:
    from tests.serve.conftest import ScriptedEngine  # type: ignore[import-not-found]

    of = ScriptedEngine(voice=voice, script=lambda request: [], context=262_144)
    engine.snapshot = of.snapshot  # type: ignore[method-assign]
    return engine


def verify(url: str, tests: str, tmp_path: Path, *options: str) -> tuple[int, int, list[str]]:
    """Runs a part of the suite: how many passed, how many failed, and which."""
    command = [PYTHON, "-m", "pytest", tests, "--tb=line", "-p", "no:cacheprovider", "-rf", f"--base-url={url}"]
    command += ["--api-key=x", f"--smoke-model={MODEL}", f"--tool-json-report={tmp_path / 'report.json'}", *options]
    if "tool_call_json_schema" not in tests:
        command.remove(f"--tool-json-report={tmp_path / 'report.json'}")
    ran = subprocess.run(command, cwd=SOURCE, capture_output=True, text=True, timeout=560, check=False)
    failed = re.findall(r"^FAILED (\S+)", ran.stdout, re.MULTILINE)
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|error)", ran.stdout)}
    assert "passed" in counts, ran.stdout + ran.stderr
    print(tests, json.dumps(counts), *failed, sep="\n  ")
    return counts.get("passed", 0), counts.get("failed", 0) + counts.get("error", 0), failed


@pytest.mark.parametrize("part", ["tool_choice", "response_format", "dynamic_tools", "thinking_effort"])
def test_the_api_behaves_as_moonshots(url, tmp_path, part):
    passed, failed, names = verify(url, f"tests/k3_features/test_{part}.py", tmp_path)
    assert passed
    assert [name for name in names if not any(each in name for each in HOSTED_ONLY)] == []
    assert failed == len(names)


def test_only_the_hosted_services_own_rules_on_parameters_are_not_ours(url, tmp_path):
    passed, _, names = verify(url, "tests/params", tmp_path)
    hosted = ("temperature=1.1", "temperature=2.0", "top_p=0.8", "presence_penalty=0.5", "frequency_penalty=0.5", "n=2")
    assert passed
    assert [name for name in names if not any(name.endswith(f"-{rule}]") for rule in hosted)] == []


def test_every_schema_is_obeyed_and_nothing_is_markup(url, tmp_path):
    passed, failed, names = verify(url, "tests/tool_call_json_schema", tmp_path)
    assert (failed, names) == (0, [])
    assert passed >= 408  # of 424, those whose schema can be a tool's parameters, streamed and not
