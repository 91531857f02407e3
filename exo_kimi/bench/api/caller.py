"""What every API check uses: requests to one server and words for what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import httpx

from exo_kimi.sse import event_data

REQUEST_TIMEOUT_S = 60.0
QUESTION = [{"role": "user", "content": "Name three colours of the sky."}]


class Broken(AssertionError):
    """The server did something else than the documentation says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One documented behaviour. `about` says it in one sentence; `run` raises Broken when the server differs."""

    area: str
    name: str
    about: str
    run: Callable[[Caller], None]


@dataclass(slots=True)
class Checks:
    """The checks of one area: fills itself by decoration, in the order of the file; the docstring becomes `about`."""

    area: str
    items: list[Check] = field(default_factory=list)

    def __call__(self, run: Callable[[Caller], None]) -> Callable[[Caller], None]:
        """Register a check under its function's name."""
        about = " ".join((run.__doc__ or "").split())
        self.items.append(Check(area=self.area, name=run.__name__.replace("_", " "), about=about, run=run))
        return run


class Caller:
    """One server.

    Args:
        url: base address, without `/v1`.
        api_key: bearer token.
        model: to ask for; None takes the first that the server lists.
        timeout_s: of one answer.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, model: str | None = None, timeout_s: float = REQUEST_TIMEOUT_S
    ) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self.http = httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=timeout_s, trust_env=False)
        self._model = model

    @property
    def model(self) -> str:
        """The first model that the server lists."""
        if self._model is None:
            listed = self.http.get("/v1/models").json()
            self._model = str(listed["data"][0]["id"])
        return self._model

    def healthy(self) -> bool:
        """Whether the server says that it is well; one that has no word for it must answer with a token."""
        try:
            status = self.http.get("/health").status_code
            if status == 404:  # exo goes on without its model when an engine has died
                status = self.http.post("/v1/chat/completions", json=self.body(max_tokens=1)).status_code
            return status == 200
        except httpx.HTTPError:
            return False

    def body(self, **fields: Any) -> dict[str, Any]:
        """A short greedy chat request with some fields more, or others."""
        base = {"model": self.model, "messages": QUESTION, "max_tokens": 12, "temperature": 0}
        return {key: value for key, value in {**base, **fields}.items() if value is not ...}

    def chat(self, **fields: Any) -> dict[str, Any]:
        """A whole chat answer; a field given as `...` is left out."""
        return self.post("/v1/chat/completions", self.body(**fields))

    def text(self, **fields: Any) -> dict[str, Any]:
        """A whole text completion."""
        base = {"model": self.model, "prompt": "The sky is", "max_tokens": 8, "temperature": 0}
        return self.post("/v1/completions", {key: v for key, v in {**base, **fields}.items() if v is not ...})

    def post(self, path: str, body: object) -> dict[str, Any]:
        """The JSON of a 200."""
        response = self.http.post(path, json=body)
        if response.status_code != 200:
            broken(f"HTTP {response.status_code}: {response.text[:160]}")
        answer = response.json()
        expect(isinstance(answer, dict), "the answer is no JSON object")
        return dict(answer)

    def stream(self, path: str = "/v1/chat/completions", **fields: Any) -> list[dict[str, Any]]:
        """The chunks of a streamed answer, which must end with [DONE]."""
        with self.open_stream(path, **fields) as events:
            chunks = list(events)
        expect(bool(chunks) and chunks[-1] == "[DONE]", "the stream does not end with [DONE]")
        return [json.loads(chunk) for chunk in chunks[:-1]]

    @contextmanager
    def open_stream(self, path: str = "/v1/chat/completions", **fields: Any) -> Iterator[Iterator[str]]:
        """The `data` of the events as they come; leaving early closes the connection."""
        body = self.body(**{"stream": True, **fields})
        with self.http.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                broken(f"HTTP {response.status_code}: {response.read()[:160]!r}")
            kind = response.headers.get("content-type", "")
            expect(kind.startswith("text/event-stream"), f"the content type is {kind!r}")
            yield event_data(response)

    def refused(self, status: int, fields: dict[str, Any], path: str = "/v1/chat/completions") -> bytes:
        """The body of a refusal with this status. Streamed, so that a server that accepts it is not waited for."""
        with self.http.stream("POST", path, json=self.body(**{"stream": True, **fields})) as response:
            if response.status_code == 200:
                broken("accepted with 200")
            expect_status(response.status_code, status)
            return response.read()


def expect_status(found: int, status: int) -> None:
    """Raise Broken unless the status is the documented one."""
    expect(found == status, f"HTTP {found} instead of {status}")


def error_object(content: bytes) -> dict[str, Any]:
    """The `error` of OpenAI's error format."""
    try:
        error = json.loads(content)["error"]
    except (ValueError, LookupError, TypeError):
        broken(f"no error object: {content[:120]!r}")
    if not isinstance(error, dict):
        broken(f"the error is a bare {type(error).__name__}, not an object")
    missing = {"message", "type", "param", "code"} - error.keys()
    expect(not missing, f"the error object lacks {', '.join(sorted(missing))}")
    return error


def expect(condition: bool, otherwise: str) -> None:
    """Raise Broken unless the condition holds."""
    if not condition:
        raise Broken(otherwise)


def broken(reason: str) -> NoReturn:
    """Raise Broken."""
    raise Broken(reason)


def content_of(answer: dict[str, Any], choice: int = 0) -> str:
    """The text of a chat answer."""
    content = answer["choices"][choice]["message"].get("content")
    expect(isinstance(content, str), f"the content is {content!r}")
    return str(content)


def joined(chunks: list[dict[str, Any]], key: str = "content", choice: int = 0) -> str:
    """The text of a streamed chat answer."""
    parts = [
        part["delta"].get(key) or ""
        for chunk in chunks
        for part in chunk["choices"]
        if part["index"] == choice and part.get("delta")
    ]
    return "".join(parts)
