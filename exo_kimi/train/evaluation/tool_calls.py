"""What a server does with tools: how often it calls one, how often the arguments obey the schema, how far two servers agree.

The measures are those of Moonshot's vendor verifier, for a Mac owner's own quantizations: of a quantization that broke something,
the share of valid calls falls first. Questions are made up here, half of them in need of a tool; or they come from a file.

Source: MoonshotAI/K2-Vendor-Verifier (`tool_call_f1`, `schema_accuracy`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from exo_kimi.compress.compare.server import open_client, served_model
from exo_kimi.compress.compare.tool_validity import call_problem
from exo_kimi.compress.texts.tool_requests import TOOLS, free, needing
from exo_kimi.errors import RuntimeFault, UsageError

MAX_TOKENS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolAnswer:
    """What a server made of one request.

    Args:
        calls: name and arguments of each call.
        problems: one sentence for each call that is not valid.
        failed: why there is no answer at all.
    """

    calls: tuple[tuple[str, str], ...] = ()
    problems: tuple[str, ...] = ()
    failed: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolReport:
    """The measures of one server, and its agreement with another where there is one.

    Args:
        requests: how many were sent.
        expected: how many of them need a tool; None where that is not known (a file of one's own).
        answers: of the server, in the order of the requests.
        reference: of the other server.
    """

    requests: int
    expected: tuple[bool, ...] | None
    answers: tuple[ToolAnswer, ...]
    reference: tuple[ToolAnswer, ...] | None = None

    def measures(self) -> dict[str, float | int | None]:
        """All figures by their names; shares from 0 to 1, None where there is nothing to take a share of."""
        called = [bool(answer.calls) for answer in self.answers]
        calls = sum(len(answer.calls) for answer in self.answers)
        wrong = sum(len(answer.problems) for answer in self.answers)
        found: dict[str, float | int | None] = {
            "requests": self.requests,
            "failed": sum(answer.failed is not None for answer in self.answers),
            "called_share": _share(sum(called), self.requests),
            "calls": calls,
            "valid_calls_share": _share(calls - wrong, calls),
        }
        if self.expected is not None:
            right = sum(one == other for one, other in zip(called, self.expected, strict=True))
            found["called_as_expected_share"] = _share(right, self.requests)
        if self.reference is not None:
            theirs = [bool(answer.calls) for answer in self.reference]
            both = sum(one and other for one, other in zip(called, theirs, strict=True))
            found["agreement_f1"] = _share(2 * both, sum(called) + sum(theirs))
            same = sum(
                [name for name, _ in one.calls] == [name for name, _ in other.calls]
                for one, other in zip(self.answers, self.reference, strict=True)
            )
            found["same_functions_share"] = _share(same, self.requests)
        return found

    def to_text(self, wrong: int = 0) -> str:
        """A line a figure, and the first calls that are not valid."""
        lines = [
            f"{name:26} {'-' if value is None else f'{value:.3f}' if isinstance(value, float) else value}"
            for name, value in self.measures().items()
        ]
        problems = [
            problem for answer in self.answers for problem in (*answer.problems, *filter(None, [answer.failed]))
        ]
        return "\n".join([*lines, *problems[:wrong]])

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps({"eval": "tools", **self.measures()})


def evaluate_tools(
    url: str,
    *,
    say: Callable[[str], None],
    against: str | None = None,
    requests: Path | None = None,
    count: int = 100,
    seed: int = 0,
    api_key: str | None = None,
    transport: httpx.BaseTransport | None = None,
) -> ToolReport:
    """Send requests with tools to one server or two, and judge what comes back.

    Args:
        url: of the server, with or without `/v1`.
        say: told of the progress.
        against: another server to compare with, such as a better quantization or the hosted service.
        requests: a file with one chat request a line, in place of our questions.
        count: questions, at most as many as the file has.
        seed: of the questions.
        api_key: sent to both.
        transport: another way to reach the servers (tests).

    Raises:
        UsageError: a server cannot be reached, or the file is not readable.
    """
    bodies: list[dict[str, Any]]
    expected: tuple[bool, ...] | None
    bodies, expected = _read(requests, count) if requests is not None else _questions(count, seed)
    answers = []
    for address in (url, against) if against else (url,):
        with open_client(address, api_key, transport) as client:
            model = served_model(client)
            found = []
            for number, body in enumerate(bodies, start=1):
                found.append(_ask(client, {**body, "model": model, "stream": False}))
                say(f"{address}: {number} of {len(bodies)}")
            answers.append(tuple(found))
    return ToolReport(
        requests=len(bodies),
        expected=expected,
        answers=answers[0],
        reference=answers[1] if len(answers) > 1 else None,
    )


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _questions(count: int, seed: int) -> tuple[list[dict[str, Any]], tuple[bool, ...]]:
    rng = random.Random(seed)
    bodies, expected = [], []
    for number in range(count):
        needs = number % 2 == 0
        text = needing(rng)[0] if needs else free(rng)
        bodies.append(
            {
                "messages": [{"role": "user", "content": text}],
                "tools": list(TOOLS),
                "temperature": 0,
                "max_tokens": MAX_TOKENS,
            }
        )
        expected.append(needs)
    return bodies, tuple(expected)


def _read(path: Path, count: int) -> tuple[list[dict[str, Any]], None]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        bodies = [json.loads(line) for line in lines if line.strip()][:count]
    except (OSError, ValueError) as error:
        raise UsageError("the requests cannot be read", found=error, where=path) from None
    if not bodies or not all(isinstance(body, dict) and body.get("messages") for body in bodies):
        raise UsageError("the file holds no chat requests", expected="one JSON object with messages a line", where=path)
    return bodies, None


def _ask(client: httpx.Client, body: dict[str, Any]) -> ToolAnswer:
    try:
        response = client.post("/v1/chat/completions", json=body)
        if response.status_code != 200:
            return ToolAnswer(failed=f"HTTP {response.status_code}: {response.text[:200]}")
        message = response.json()["choices"][0]["message"]
        calls = tuple(
            (str(call["function"]["name"]), str(call["function"]["arguments"]))
            for call in message.get("tool_calls") or ()
        )
    except httpx.TransportError as error:
        raise RuntimeFault("the server went away", where=client.base_url, found=error) from None
    except (ValueError, LookupError, TypeError) as error:
        return ToolAnswer(failed=f"the answer cannot be read: {error}")
    problems = [
        problem for name, arguments in calls if (problem := call_problem(name, arguments, body.get("tools") or ()))
    ]
    return ToolAnswer(calls=calls, problems=tuple(problems))
