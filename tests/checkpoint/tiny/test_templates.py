"""The templates that tiny checkpoints carry render what Kimi's own templates render."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

REPO = Path(__file__).parents[3]
REAL = REPO.parent / "shared" / "data" / "templates"
OURS = REPO / "exo_kimi" / "checkpoint" / "data"
TOOLS = [{"type": "function", "function": {"name": "add", "description": "a<b & c", "parameters": {"type": "object"}}}]
PICTURE = [{"type": "text", "text": "See "}, {"type": "image_url", "image_url": {"url": "x"}}, {"text": "!"}]
PLAIN: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello\n"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PICTURE}],
    [
        {"role": "user", "content": " one "},
        {"role": "assistant", "content": "two"},
        {"role": "tool", "content": "result", "tool_call_id": "functions.add:0"},
        {"role": "user", "content": "three"},
    ],
    [],
]
CALL = {"id": "functions.add:0", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CALL_OBJECT = {"id": "functions.add:1", "type": "function", "function": {"name": "add", "arguments": {"a": [2]}}}
WITH_CALLS: list[list[dict[str, Any]]] = [
    [
        {"role": "user", "content": "2+2", "name": "ada"},
        {"role": "assistant", "content": "4", "reasoning_content": "easy"},
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [CALL, CALL_OBJECT]},
        {"role": "tool", "content": "2", "tool_call_id": "functions.add:0"},
        {"role": "assistant", "content": "one more", "tool_calls": [CALL]},
        {"role": "tool", "content": [{"type": "text", "text": "3"}], "tool_call_id": "functions.add:1"},
    ]
]


def render(path: Path, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, prompt: bool) -> str:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], undefined=jinja2.Undefined
    )
    template = environment.from_string(path.read_text(encoding="utf-8"))
    return template.render(messages=messages, tools=tools, add_generation_prompt=prompt)


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data/templates beside the checkout")
@pytest.mark.parametrize(("name", "conversations"), [("Instruct", PLAIN), ("Thinking", PLAIN + WITH_CALLS)])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("prompt", [True, False])
def test_tiny_templates_render_as_the_real_ones(
    name: str, conversations: list[list[dict[str, Any]]], tools: list[dict[str, Any]] | None, prompt: bool
) -> None:
    for messages in conversations:
        expected = render(REAL / f"Kimi-K2-{name}.jinja", messages, tools, prompt)
        assert render(OURS / f"{name.lower()}.jinja", messages, tools, prompt) == expected


def test_instruct_template_replays_tool_calls() -> None:
    text = render(OURS / "instruct.jinja", WITH_CALLS[0], TOOLS, True)
    call = '<|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|>'
    assert f"<|tool_calls_section_begin|>{call}" in text
    assert "None" not in text
