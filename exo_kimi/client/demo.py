"""`exo-kimi demo`: the tiny Kimi of the package, stages, a short conversation with a tool, and the server stays."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from importlib import resources
from pathlib import Path
from typing import Any

from exo_kimi.client.chat_client import ChatClient
from exo_kimi.errors import ExoKimiError, RuntimeFault
from exo_kimi.serve.launch import ServeOptions, serve
from exo_kimi.units import format_bytes

MODEL_ID = "tiny-kimi-k2"
ANSWER_TOKENS = 96
READY_WITHIN_S = 120.0
QUESTIONS = ("What is the capital of Norway?", "How much is 58 plus 36?")
TOOL_QUESTION = "What is the weather in Oslo?"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
OBSERVED = {"sky": "rain", "degrees": 7}
"""What the demonstration's weather station says of every city."""


def shipped_model() -> Path:
    """The trained checkpoint inside the package."""
    return Path(str(resources.files("exo_kimi").joinpath("data", MODEL_ID)))


def demo(*, stages: int, host: str, port: int, once: bool) -> None:
    """Run the demonstration until Ctrl-C, or until the conversation is over when `once` is set.

    Raises:
        ExoKimiError: what `serve` or the chat raised.
    """
    directory = shipped_model()
    size = sum(file.stat().st_size for file in directory.iterdir())
    _say(f"a tiny Kimi K2, trained from scratch: 6 layers, native INT4 experts, {format_bytes(size)}")
    client = _DemoClient(once=once)
    options = ServeOptions(directory=directory, host=host, port=port, stages=stages, dtype="float32", model_id=MODEL_ID)
    serve(options, announce=client.start)
    if client.failure is not None:
        raise client.failure


class _DemoClient:
    """A client in a thread of its own: it waits for the stages, asks a few questions and shows the answers as they come."""

    def __init__(self, *, once: bool) -> None:
        self.failure: ExoKimiError | None = None
        self._once = once

    def start(self, url: str) -> None:
        threading.Thread(target=self._run, args=(url,), name="demo", daemon=True).start()

    def _run(self, url: str) -> None:
        try:
            with ChatClient(url) as client:
                self._wait_ready(client)
                self._converse(client)
        except ExoKimiError as error:
            self.failure = error
        if self._once or self.failure is not None:
            os.kill(os.getpid(), signal.SIGINT)
        else:
            _say(f"serving at {url} until Ctrl-C; in another terminal: exo-kimi chat --url {url}")

    def _wait_ready(self, client: ChatClient) -> None:
        deadline = time.monotonic() + READY_WITHIN_S
        while (report := client.health()).get("status") != "ok":
            if time.monotonic() > deadline:
                raise RuntimeFault(
                    "the stages are not ready", found=report.get("reason"), expected=f"{READY_WITHIN_S:g} s"
                )
            time.sleep(0.1)
        for stage in report["stages"]:
            layers = f"layers {stage['start_layer']}:{stage['end_layer']}"
            _say(
                f"stage {stage['stage']} holds {layers} in process {stage['pid']}: {format_bytes(stage['weights_bytes'])}"
            )

    def _converse(self, client: ChatClient) -> None:
        messages: list[dict[str, Any]] = []
        for question in QUESTIONS:
            messages.append({"role": "user", "content": _shown(question)})
            messages.append(_reply(client, messages))
        messages = [{"role": "user", "content": _shown(TOOL_QUESTION)}]
        called = _reply(client, messages, tools=[WEATHER])
        messages.append(called)
        for call in called.get("tool_calls", ()):
            result = json.dumps(OBSERVED)
            _say(f"the tool returns {result}")
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        if called.get("tool_calls"):
            _reply(client, messages, tools=[WEATHER])


def _reply(client: ChatClient, messages: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    """The assistant's message, shown while it comes: reasoning in brackets, a call of a tool after an arrow."""
    _write("kimi: ")
    content, calls, thinking = "", [], False
    for delta in client.stream(messages, max_tokens=ANSWER_TOKENS, temperature=0, **options):
        if thinking != bool(delta.reasoning) and (delta.reasoning or delta.content):
            _write(") " if thinking else "(")
            thinking = not thinking
        _write(delta.reasoning + delta.content + "".join(f"-> {call}" for call in delta.tool_calls))
        content += delta.content
        calls += [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in delta.tool_calls
        ]
    print(flush=True)
    return {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {})}


# A model may pick bytes at random; control characters among them must not steer the terminal.
_VISIBLE = {code: "\N{MIDDLE DOT}" for code in (*range(32), *range(127, 160), 0xFFFD) if chr(code) != "\n"}


def _write(text: str) -> None:
    sys.stdout.write(text.translate(_VISIBLE))
    sys.stdout.flush()


def _shown(question: str) -> str:
    print(f"you:  {question}", flush=True)
    return question


def _say(text: str) -> None:
    print(f"demo: {text}", flush=True)
