"""Run by test_real_exo_api in exo's own Python: exo's real API without nodes, asked on every route.

Its chunks are as our runner writes them. Prints one JSON object: "ROUTE SCRIPT stream|whole" -> [status, content type, text].
"""

from __future__ import annotations

import asyncio
import json
import sys
from types import SimpleNamespace
from typing import Any

import httpx
from exo.api.main import API
from exo.api.types import ToolCallItem
from exo.shared.types.chunks import ErrorChunk, TokenChunk, ToolCallChunk
from exo.utils.channels import channel

from exo_kimi.errors import ContextLengthError, StageDiedError, UnsupportedError
from exo_kimi.plugin.api.refusal import Refusal
from exo_kimi.plugin.runner.launch import bind

KIMI, LLAMA = "lab/kimi-k2-tiny", "lab/llama"
TOO_LONG = ContextLengthError("the prompt has 70 tokens, and the context holds 64", code="context_length_exceeded")
ASKED = [{"role": "user", "content": "Hi"}]
ROUTES = {
    "/v1/chat/completions": {"messages": ASKED},
    "/ollama/v1/chat/completions": {"messages": ASKED},
    "/bench/chat/completions": {"messages": ASKED},
    "/v1/messages": {"messages": ASKED, "max_tokens": 10**6},
    "/v1/responses": {"input": "Hi"},
    "/ollama/api/chat": {"messages": ASKED},
    "/ollama/api/generate": {"prompt": "Hi"},
}


def error(text: str, model: str = KIMI) -> ErrorChunk:
    return ErrorChunk(model=model, error_message=text)


def token(text: str, reason: Any = None) -> TokenChunk:
    return TokenChunk(model=KIMI, text=text, token_id=1, usage=None, finish_reason=reason)


SCRIPTS: dict[str, list[Any]] = {
    "fine": [token("Hel"), token("lo"), token("", "stop")],
    "refused": [error(Refusal.of(TOO_LONG).to_text())],
    "image": [error(Refusal.of(UnsupportedError("images are not supported")).to_text())],
    "gone": [error(Refusal.of(StageDiedError("stage 1 died")).to_text())],
    "late": [token("Hel"), error(Refusal.of(StageDiedError("stage 1 died")).to_text())],
    "killed": [error("Runner shutdown before completing command (signal=9)")],
    "closed": [],
    "half a call": [
        ToolCallChunk(model=KIMI, tool_calls=[ToolCallItem(name="write", arguments='{"text": "half')], usage=None)
    ],
    "llama": [error("boom", LLAMA)],
}


class ScriptedApi(API):
    """exo's API over chunks that are there already."""

    script: str = "fine"

    async def _send(self, command: Any) -> None:
        if type(command).__name__ == "TextGeneration":
            self.feeding = asyncio.create_task(self._feed(command.command_id))

    async def _feed(self, command_id: Any) -> None:
        while command_id not in self._text_generation_queues:
            await asyncio.sleep(0.001)
        queue = self._text_generation_queues[command_id]
        for chunk in SCRIPTS[self.script]:
            await queue.send(chunk)
        if not SCRIPTS[self.script]:
            queue.close()


def placed(model: str) -> Any:
    shard = SimpleNamespace(model_card=SimpleNamespace(context_length=4096))
    return SimpleNamespace(shard_assignments=SimpleNamespace(model_id=model, runner_to_shard={"r": shard}))


async def main() -> None:
    receivers = [channel[Any]() for _ in range(4)]
    api = ScriptedApi(
        "node",
        port=0,
        event_receiver=receivers[0][1],
        command_sender=receivers[1][0],
        download_command_sender=receivers[2][0],
        election_receiver=receivers[3][1],
    )
    api.state = SimpleNamespace(  # type: ignore[assignment]
        instances={name: placed(name) for name in (KIMI, LLAMA)}, downloads={}, tasks={}, node_system={}
    )
    answers: dict[str, tuple[int, str, str]] = {}
    transport = httpx.ASGITransport(api.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://exo", timeout=20) as client:
        for script in SCRIPTS:
            api.script = script
            model = LLAMA if script == "llama" else KIMI
            for route, body in ROUTES.items():
                for stream in (True, False):
                    try:
                        answer = await client.post(route, json={**body, "model": model, "stream": stream})
                        found = (answer.status_code, answer.headers.get("content-type", ""), answer.text)
                    except (httpx.HTTPError, AssertionError) as failed:  # the transport's, when no head was sent
                        found = (0, "", repr(failed))
                    answers[f"{route} {script} {'stream' if stream else 'whole'}"] = found
        unknown = await client.post("/v1/chat/completions", json={"model": "lab/none", "messages": ASKED})
        answers["unknown"] = (unknown.status_code, "", unknown.text)
        listed = await client.get("/v1/models")
        (card,) = (each for each in listed.json()["data"] if each["id"] == KIMI)
        answers["listed"] = (listed.status_code, "", json.dumps(card))
        shown = await client.post("/ollama/api/show", json={"model": KIMI})
        answers["shown"] = (shown.status_code, "", shown.text)
        added = await client.post("/models/add", json={"model_id": KIMI})
        answers["added"] = (added.status_code, "", added.text)
    print(json.dumps(answers))


if __name__ == "__main__":
    if "--bare" not in sys.argv:
        assert bind() == (), bind()
    asyncio.run(main())
