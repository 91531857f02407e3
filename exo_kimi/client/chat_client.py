"""A small client of OpenAI's chat API over httpx: one streaming call, one clear error for every way it can fail."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import httpx
from httpx_sse import SSEError

from exo_kimi.errors import ExoKimiError, RequestError, RuntimeFault, UsageError
from exo_kimi.sse import event_data

CONNECT_TIMEOUT_S = 10.0
# Between two bytes. Long, because servers other than ours send nothing while they read a long prompt.
SILENCE_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A tool call."""

    id: str
    name: str
    arguments: str

    def __str__(self) -> str:
        return f"{self.name}({self.arguments})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """One step of an answer; tool calls come whole, with the finish reason."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[Call, ...] = ()
    finish_reason: str | None = None


class ChatClient:
    """Talks to one server.

    Args:
        url: base address, with or without `/v1`.
        api_key: bearer token.
        model: None takes the first that the server lists.
        transport: another way to reach the server (tests).
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        model: str | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._model = model
        try:
            self._http = httpx.Client(
                base_url=self.url,
                headers={"authorization": f"Bearer {api_key}"} if api_key else {},
                timeout=httpx.Timeout(SILENCE_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
                transport=transport,
                trust_env=False,
            )
        except (httpx.InvalidURL, UnicodeError) as error:
            raise UsageError("cannot read the server's address", found=f"{url} ({error})") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def model(self) -> str:
        """The model that answers.

        Raises:
            UsageError: no server answers at the address.
            ExoKimiError: it answers with an error.
        """
        if self._model is None:
            try:
                response = self._http.get("/v1/models")
            except httpx.TransportError as error:
                raise self._unreachable(error) from None
            if response.status_code != 200:
                raise _refusal(response.status_code, response.content)
            try:
                self._model = str(response.json()["data"][0]["id"])
            except (ValueError, LookupError, TypeError):
                raise UsageError("this is not a chat server", where=f"{self.url}/v1/models") from None
        return self._model

    def health(self) -> dict[str, Any]:
        """What the server says of itself, healthy or not.

        Raises:
            UsageError: no server answers at the address, or it has no /health in JSON.
        """
        try:
            report = self._http.get("/health").json()
        except httpx.TransportError as error:
            raise self._unreachable(error) from None
        except ValueError:
            report = None
        if not isinstance(report, dict):
            raise UsageError("this server says nothing of its health", where=f"{self.url}/health")
        return report

    def stream(self, messages: Sequence[dict[str, Any]], **options: Any) -> Iterator[Delta]:
        """The answer to a conversation, as it comes.

        Raises:
            UsageError: no server answers at the address.
            RequestError: the request was refused.
            RuntimeFault: the server failed, before or in the middle of the answer.
        """
        body = {"model": self.model(), "messages": list(messages), "stream": True, **options}
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    raise _refusal(response.status_code, response.read())
                yield from _deltas(event_data(response))
        except httpx.ConnectError as error:
            raise self._unreachable(error) from None
        except SSEError as error:
            raise RuntimeFault("the server did not stream its answer", found=error) from None
        except httpx.TransportError as error:
            raise RuntimeFault("the connection broke in the middle of the answer", found=error) from None

    def _unreachable(self, error: Exception) -> UsageError:
        return UsageError(
            "no server answers", where=self.url, found=error, fix="start one with `exo-kimi serve`, or give --url"
        )


def _deltas(events: Iterator[str]) -> Iterator[Delta]:
    calls: dict[int, Call] = {}
    for data in events:
        if data == "[DONE]":
            return
        try:
            chunk = json.loads(data)
        except ValueError:
            raise RuntimeFault("the server sent an event that is not JSON", found=data[:200]) from None
        if error := chunk.get("error"):
            raise RuntimeFault(_message(error))
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            for place, piece in enumerate(delta.get("tool_calls") or ()):
                index = piece.get("index", place)
                calls[index] = _grown(calls.get(index), piece)
            ended = choice.get("finish_reason") is not None
            yield Delta(
                content=delta.get("content") or "",
                reasoning=delta.get("reasoning_content") or delta.get("reasoning") or "",
                tool_calls=tuple(calls.values()) if ended else (),
                finish_reason=choice.get("finish_reason"),
            )
    raise RuntimeFault("the answer ended without [DONE]", fix="look at the server's log")


def _grown(call: Call | None, piece: dict[str, Any]) -> Call:
    """A call with its next piece: the first has the id and the name, the others more of the arguments."""
    function = piece.get("function") or {}
    call = call or Call(id=piece.get("id") or "", name=function.get("name") or "", arguments="")
    return replace(call, arguments=call.arguments + (function.get("arguments") or ""))


def _refusal(status: int, body: bytes) -> ExoKimiError:
    try:
        message = _message(json.loads(body)["error"])
    except (ValueError, LookupError, TypeError):
        message = body[:500].decode("utf-8", errors="replace") or "no reason given"
    if status >= 500:
        return RuntimeFault(message, found=f"HTTP {status}")
    return RequestError(message, found=f"HTTP {status}")


def _message(error: object) -> str:
    """The text of an error object; some servers send a bare string."""
    return str(error.get("message") or error) if isinstance(error, dict) else str(error)
