"""What every HTTP request passes before a route sees it: its host and key; each answer gets a count, a log line and an id."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import uuid
from collections.abc import Iterable
from typing import Protocol
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from exo_kimi.serve.problems import ApiProblem

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset(
    {"/", "/health", "/docs", "/openapi.json"}
)  # they tell what the source tells; a browser has no key
OPEN_FOLDERS = ("/docs-files/", "/page/")
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
ANY = "*"
ADDRESSES = "addresses"  # no name of a page: its browser shows the address, so nothing was rebound
REQUEST_ID_HEADERS = (b"x-request-id", b"request-id")  # OpenAI's and Anthropic's
POLLED_PATHS = frozenset({"/health", "/metrics"})  # asked every few seconds: no log lines


HAS_KEY = "exo_kimi.has_key"  # in a request's scope: whether it may know what only clients with the key may
REQUEST_ID = "exo_kimi.request_id"  # in a request's scope, for whoever answers in its place


def new_request_id() -> str:
    """A name for one request, in its answer and in the log."""
    return f"req_{uuid.uuid4().hex}"


class AnswerCounter(Protocol):
    """Is told the path and status of every answer."""

    def answered(self, path: str, status: int) -> None:
        """An HTTP request was answered."""
        ...


class Gate:
    """ASGI middleware.

    Args:
        app: what is behind.
        metrics: told the path (as the routes know it) and the status of every answer.
        paths: paths that may become a label; all others count as `other`.
        api_key: when given, every path needs `Authorization: Bearer KEY` or `x-api-key`, but for /health (which says less
            without it), / with the page's files, and the documentation.
        hosts: names that `Host` and `Origin` may have (`allowed_hosts`), without which any web page could have a browser
            reach this server under a name of its own (DNS rebinding); None or `*` allows all.
        origins: of web pages that may call this server (`--cors-origin`); `*` allows all.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: AnswerCounter,
        paths: frozenset[str],
        api_key: str | None = None,
        hosts: frozenset[str] | None = None,
        origins: frozenset[str] = frozenset(),
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = paths
        self._api_key = api_key
        self._hosts = frozenset({ANY}) if hosts is None else hosts
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 401 and 403 itself, and counts whatever is answered."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = scope[REQUEST_ID] = new_request_id()
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def counting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.answered(path, message["status"])
                level = logging.DEBUG if path in POLLED_PATHS else logging.INFO
                log.log(level, "%s %s %r %d", request_id, scope["method"], scope["path"], message["status"])
                ids = [(name, request_id.encode()) for name in REQUEST_ID_HEADERS]
                message = {**message, "headers": [*message["headers"], *ids]}
            await send(message)

        scope[HAS_KEY] = self._has_key(scope)
        refusal = self._wrong_host(scope)
        if refusal is None and not (scope[HAS_KEY] or self._is_open(scope)):
            refusal = ApiProblem(
                401,
                "missing or wrong API key: send `Authorization: Bearer KEY` or `x-api-key: KEY`",
                code="invalid_api_key",
            )
        if refusal is not None:
            await refusal.response(scope["path"])(scope, receive, counting_send)
        else:
            await self._app(scope, receive, counting_send)

    def _wrong_host(self, scope: Scope) -> ApiProblem | None:
        if ANY in self._hosts:
            return None
        for name, value in scope["headers"]:
            if name not in (b"host", b"origin"):
                continue
            text = value.decode("latin-1")
            if name == b"origin" and (ANY in self._origins or text in self._origins):
                continue
            host = host_name(text if name == b"origin" else f"//{text}")
            if host is None or not self._is_ours(host):
                message = (
                    f"this server does not answer to the {name.decode().title()} {text[:200]!r}: "
                    f"start it with --allowed-host {host or 'NAME'}, if that is yours"
                )
                return ApiProblem(403, message, code="host_not_allowed")
        return None

    def _is_ours(self, host: str) -> bool:
        return host in self._hosts or (ADDRESSES in self._hosts and _is_address(host))

    def _is_open(self, scope: Scope) -> bool:
        if scope["method"] == "OPTIONS":
            return True  # a browser asks without the key whether its page may send one; nothing else takes OPTIONS
        return scope["path"] in OPEN_PATHS or scope["path"].startswith(OPEN_FOLDERS)

    def _has_key(self, scope: Scope) -> bool:
        if self._api_key is None:
            return True
        headers: Iterable[tuple[bytes, bytes]] = scope["headers"]
        key = next((value for name, value in headers if name == b"x-api-key"), b"")  # Anthropic's header
        given = next((value for name, value in headers if name == b"authorization"), b"")
        scheme, _, bearer = given.partition(b" ")
        keys = [key.strip(), bearer.strip() if scheme.lower() == b"bearer" else b""]
        # In constant time: the time must not tell how much of a key is right.
        return sum(hmac.compare_digest(each, self._api_key.encode()) for each in keys) > 0


def allowed_hosts(bound: str, extra: Iterable[str] = ()) -> frozenset[str]:
    """The names of this server: loopback's, the address bound, and what the user allowed.

    A server on all interfaces answers to every IP address: rebinding needs a name.

    Args:
        bound: `--host`.
        extra: of `--allowed-host`; `*` allows all.
    """
    every = {ADDRESSES} if bound in ("", "0.0.0.0", "::") else set()  # compared, not bound
    return LOOPBACK_NAMES | every | {name.lower().strip("[]").rstrip(".") for name in (bound, *extra)}


def host_name(url: str) -> str | None:
    """The lower-case host of a URL without port and brackets; None when there is none (`Origin: null`)."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises, if it is none
        host = parts.hostname
    except ValueError:
        return None
    plain = parts.username is None and not parts.path.strip("/") and not parts.query and not parts.fragment
    return host.rstrip(".") if host and plain else None


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
