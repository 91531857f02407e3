"""What every HTTP request passes before a route sees it: the API key, and a count, a log line and an id for each answer."""

from __future__ import annotations

import hmac
import logging
import uuid
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from exo_kimi.serve.metrics import Metrics
from exo_kimi.serve.problems import ApiProblem

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/docs", "/openapi.json"})  # they tell what the source tells; a browser has no key
OPEN_FOLDER = "/docs-files/"
POLLED_PATHS = frozenset({"/health", "/metrics"})  # asked every few seconds: no log lines


class Gate:
    """ASGI middleware.

    Args:
        app: what is behind.
        metrics: told the path (as the routes know it) and the status of every answer.
        paths: paths that may become a label; all others count as `other`.
        api_key: when given, every path but /health and the documentation needs `Authorization: Bearer KEY`.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, paths: frozenset[str], api_key: str | None = None) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = paths
        self._api_key = api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 401 itself, and counts whatever is answered."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{uuid.uuid4().hex}"
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def counting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.answered(path, message["status"])
                level = logging.DEBUG if path in POLLED_PATHS else logging.INFO
                log.log(level, "%s %s %r %d", request_id, scope["method"], scope["path"], message["status"])
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        if self._admits(scope):
            await self._app(scope, receive, counting_send)
        else:
            refusal = ApiProblem(
                401, "missing or wrong API key: send `Authorization: Bearer KEY`", code="invalid_api_key"
            )
            await refusal.response()(scope, receive, counting_send)

    def _admits(self, scope: Scope) -> bool:
        if self._api_key is None or scope["path"] in OPEN_PATHS or scope["path"].startswith(OPEN_FOLDER):
            return True
        headers: Iterable[tuple[bytes, bytes]] = scope["headers"]
        given = next((value for name, value in headers if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        # In constant time: the time must not tell how much of a key is right.
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._api_key.encode())
