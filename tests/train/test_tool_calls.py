"""`exo-kimi eval --tools`: shares that can be told by hand, from servers that answer what the test says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from exo_kimi.errors import UsageError
from exo_kimi.train.evaluation.tool_calls import evaluate_tools

Answer = Callable[[str], list[tuple[str, str]] | None]


def servers(**answers: Answer) -> httpx.MockTransport:
    """Servers by the name of their host: each says what it calls for a question; None is a failure."""

    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        body = json.loads(request.content)
        calls = answers[request.url.host](body["messages"][0]["content"])
        if calls is None:
            return httpx.Response(500, text="broken")
        message: dict[str, Any] = {"content": "ok"}
        if calls:
            message["tool_calls"] = [{"function": {"name": name, "arguments": text}} for name, text in calls]
        return httpx.Response(200, json={"choices": [{"message": message}]})

    return httpx.MockTransport(handle)


def judged(transport: httpx.MockTransport, **options: Any) -> dict[str, Any]:
    return evaluate_tools("http://ours", say=lambda _: None, transport=transport, **options).measures()


def weather(question: str) -> list[tuple[str, str]]:
    return [("get_weather", '{"city": "Oslo"}')] if "weather" in question else []


def test_shares_of_calls_and_of_valid_ones_are_counted() -> None:
    wrong = {
        "weather": [("get_weather", '{"city": "Oslo", "unit": "kelvin"}'), ("get_weather", '{"city": "Oslo"}')],
        "train": [("fly", "{}")],
        "mail": [("send_mail", '{"to": ["a"], "sub')],
        "lines": None,
    }

    def answer(question: str) -> list[tuple[str, str]] | None:
        return next((calls for word, calls in wrong.items() if word in question), [])

    found = evaluate_tools("http://ours/v1", say=lambda _: None, transport=servers(ours=answer), count=60, seed=3)
    measures = found.measures()
    assert measures["requests"] == 60 and measures["failed"] > 0
    valid = sum(len(each.calls) == 2 for each in found.answers)
    assert measures["valid_calls_share"] == valid / measures["calls"]
    assert 0 < measures["called_share"] < 0.5
    assert "kelvin" in found.to_text(wrong=60) and "fly is not declared" in found.to_text(wrong=60)
    assert json.loads(found.to_json())["eval"] == "tools"


def test_two_servers_agree_as_far_as_they_call_the_same() -> None:
    assert judged(servers(ours=weather, theirs=weather), against="http://theirs")["agreement_f1"] == 1.0
    silent = judged(servers(ours=weather, theirs=lambda _: []), against="http://theirs")
    assert silent["agreement_f1"] == 0.0
    assert silent["same_functions_share"] == 1 - silent["called_share"]


def test_requests_of_ones_own_are_sent(tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {"required": ["town"]}}}
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "weather"}], "tools": [tool]}) + "\n\n")
    found = judged(servers(ours=weather), requests=file)
    assert (found["requests"], found["called_share"], found["valid_calls_share"]) == (1, 1.0, 0.0)
    assert "called_as_expected_share" not in found
    file.write_text("{}\n")
    with pytest.raises(UsageError, match="no chat requests"):
        judged(servers(ours=weather), requests=file)


def test_a_server_that_is_none_is_said_so() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with pytest.raises(UsageError, match="no server answers"):
        judged(httpx.MockTransport(refuse))
