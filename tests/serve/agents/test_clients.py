"""Kimi Code, Codex, Claude Code, opencode, litellm, openai-agents and pydantic-ai read a file, edit it and answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.agents
ASKED = "Correct the spelling in greeting.txt"
SHOWN = "What is wrong on this screen?"
SCRIPTS = Path(__file__).with_name("clients")


@pytest.mark.parametrize("provider", ["kimi", "openai", "anthropic"])
def test_kimi_code_edits_a_file(agent, client_named, provider):
    command = client_named("kimi")
    node = command.parents[1] / "node" / "bin"
    if not node.exists():
        pytest.skip("Kimi Code needs node 22 or later: npm install node@24")
    run = agent(("Read", {"path": "FILE"}), ("Edit", {"path": "FILE", "old_string": "Helo", "new_string": "Hello"}))
    run.run(
        [str(command), "-p", ASKED],
        PATH=f"{node}:{run.environment['PATH']}",
        KIMI_MODEL_NAME="kimi",
        KIMI_MODEL_API_KEY="none",
        KIMI_MODEL_MAX_CONTEXT_SIZE="131072",
        KIMI_MODEL_BASE_URL=run.url if provider == "anthropic" else f"{run.url}/v1",
        KIMI_MODEL_PROVIDER_TYPE=provider,
        KIMI_CODE_HOME=str(run.folder / "home" / "kimi"),
        KIMI_DISABLE_TELEMETRY="1",
    )
    run.assert_edited()


def test_codex_edits_a_file(agent, client_named):
    command = client_named("codex")
    run = agent(
        ("exec_command", {"cmd": "cat greeting.txt"}), ("exec_command", {"cmd": "sed -i.bak s/Helo/Hello/ FILE"})
    )
    provider = f'{{name="local",base_url="{run.url}/v1",wire_api="responses",env_key="OPENAI_API_KEY"}}'
    run.run(
        [
            *(str(command), "exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"),
            *(
                "-c",
                "model_provider=local",
                "-c",
                "model_context_window=131072",
                "-c",
                f"model_providers.local={provider}",
                "-m",
                "kimi",
                ASKED,
            ),
        ]
    )
    run.assert_edited()


def test_claude_code_edits_a_file(agent, client_named):
    command = client_named("claude")
    edit = {"file_path": "FILE", "old_string": "Helo", "new_string": "Hello"}
    run = agent(("Read", {"file_path": "FILE"}), ("Edit", edit))
    run.run(
        [str(command), "-p", "--permission-mode", "acceptEdits", ASKED],
        ANTHROPIC_BASE_URL=run.url,
        ANTHROPIC_AUTH_TOKEN="x",
        ANTHROPIC_MODEL="kimi",
        ANTHROPIC_DEFAULT_HAIKU_MODEL="kimi",
        CLAUDE_CODE_AUTO_COMPACT_WINDOW="131072",
        CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
        DISABLE_TELEMETRY="1",
    )
    run.assert_edited()


def test_opencode_edits_a_file(agent, client_named):
    command = client_named("opencode")
    run = agent(
        ("read", {"filePath": "FILE"}), ("edit", {"filePath": "FILE", "oldString": "Helo", "newString": "Hello"})
    )
    limit = {"context": 262144, "output": 32000}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "options": {"baseURL": f"{run.url}/v1", "apiKey": "x"},
        "models": {"kimi": {"name": "kimi", "limit": limit}},
    }
    (run.file.parent / "opencode.json").write_text(json.dumps({"provider": {"local": provider}}))
    run.run([str(command), "run", "--model", "local/kimi", ASKED])
    run.assert_edited()


def pads(agents_checkpoint: Path, prompt: list[int]) -> int:
    return prompt.count(json.loads((agents_checkpoint / "config.json").read_text())["media_placeholder_token_id"])


def test_codex_shows_a_screenshot(agent, client_named, agents_checkpoint):
    """It is an input_image of the first message; the usage that Codex tells is that of its prompts."""
    command = client_named("codex")
    run = agent(("exec_command", {"cmd": "cat greeting.txt"}))
    provider = f'{{name="local",base_url="{run.url}/v1",wire_api="responses",env_key="OPENAI_API_KEY"}}'
    run.run(
        [
            *(str(command), "exec", "--json", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"),
            *("-c", "model_provider=local", "-c", "model_context_window=131072"),
            *("-c", f"model_providers.local={provider}", "-m", "kimi", "-i", str(run.screenshot), "--", SHOWN),
        ]
    )
    first, second = run.prompts()
    assert [pads(agents_checkpoint, prompt) for prompt in (first, second)] == [70, 70], run.log()
    assert second[: len(first)] == first
    events = [json.loads(line) for line in run.output.splitlines() if line.startswith("{")]
    (usage,) = [event["usage"] for event in events if event["type"] == "turn.completed"]
    assert usage["input_tokens"] == len(first) + len(second)


def test_claude_code_reads_a_screenshot(agent, client_named, agents_checkpoint):
    """Its Read tool answers with an image block inside the tool's result."""
    command = client_named("claude")
    run = agent(("Read", {"file_path": "SCREEN"}))
    run.run(
        [str(command), "-p", "--output-format", "json", SHOWN],
        ANTHROPIC_BASE_URL=run.url,
        ANTHROPIC_AUTH_TOKEN="x",
        ANTHROPIC_MODEL="kimi",
        ANTHROPIC_DEFAULT_HAIKU_MODEL="kimi",
        CLAUDE_CODE_AUTO_COMPACT_WINDOW="131072",
        CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
        DISABLE_TELEMETRY="1",
    )
    before, after = run.prompts()[-2:]
    assert [pads(agents_checkpoint, prompt) for prompt in (before, after)] == [0, 70], run.log()
    assert after[: len(before)] == before
    usage = json.loads(run.output)["usage"]
    told = sum(usage[key] for key in ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"))
    assert told == len(before) + len(after)


@pytest.mark.parametrize(
    ("script", "modules"),
    [
        ("litellm_loop.py", ["litellm"]),
        ("openai_agents_loop.py", ["agents"]),
        ("pydantic_ai_loop.py", ["pydantic_ai"]),
    ],
)
@pytest.mark.parametrize("door", ["chat", "responses", "messages"])
def test_a_python_agent_edits_a_file(agent, python_with, script, modules, door):
    """Each through the doors that it has."""
    python = python_with(*modules)
    if (script, door) == ("openai_agents_loop.py", "messages"):
        pytest.skip("openai-agents speaks OpenAI's APIs")
    run = agent(("read_file", {"path": "FILE"}), ("edit_file", {"path": "FILE", "old": "Helo", "new": "Hello"}))
    run.run([python, str(SCRIPTS / script), run.url, door, ASKED])
    run.assert_edited()
