"""Every failure as an HTTP status and the error object that the clients of its door expect."""

from __future__ import annotations

import logging
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from exo_kimi.errors import (
    ChatError,
    ContextLengthError,
    ExoKimiError,
    OverloadedError,
    RequestError,
    RuntimeFault,
    machine_error,
)

log = logging.getLogger(__name__)

RETRY_AFTER_S = 5
_TOO_LONG = "prompt is too long"
# Anthropic's `error.type` by status; what is not here is an invalid request below 500 and an api_error from there on.
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiProblem(Exception):
    """A failure with the status and the fields that the client will read.

    Args:
        status: HTTP status.
        message: one or more lines for a person.
        kind: OpenAI's `type`.
        param: the request field at fault.
        code: OpenAI's short machine-readable code.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code

    def body(self, path: str = "") -> dict[str, Any]:
        """OpenAI's `{"error": {message, type, param, code}}`, or what the door at the path has instead.

        Args:
            path: of the request. Source: Anthropic's and Ollama's documentation of errors.
        """
        if path.startswith("/v1/messages"):
            default = "invalid_request_error" if self.status < 500 else "api_error"
            kind = _ANTHROPIC_TYPES.get(self.status, default)
            # Claude Code shortens a conversation when it reads Anthropic's words for one that is too long.
            long = self.code == "context_length_exceeded" and not self.message.startswith(_TOO_LONG)
            message = f"{_TOO_LONG}: {self.message}" if long else self.message
            return {"type": "error", "error": {"type": kind, "message": message}}
        if path.startswith("/api/"):
            return {"error": self.message}
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self, path: str = "") -> JSONResponse:
        """The whole HTTP answer to a request for the path."""
        headers = {}
        if self.status == 503:
            headers["retry-after"] = str(RETRY_AFTER_S)
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(self.body(path), status_code=self.status, headers=headers)


def to_problem(error: BaseException) -> ApiProblem:
    """The answer that a failure deserves; what nobody foresaw becomes a 500 without any detail of the inside."""
    if isinstance(error, ApiProblem):
        return error
    if isinstance(error, ContextLengthError):
        return ApiProblem(400, str(error), param=error.param or "messages", code="context_length_exceeded")
    if isinstance(error, OverloadedError):
        return ApiProblem(503, str(error), kind="server_error", code="overloaded")
    if isinstance(error, RequestError):
        return ApiProblem(400, str(error), param=error.param, code=error.code)
    if isinstance(error, ChatError):
        # Without `where`: files of the server are none of the client's business.
        return ApiProblem(400, f"{error.what}: {error.found}" if error.found else error.what, code=_snake(error))
    if isinstance(error, RuntimeFault):
        return ApiProblem(503, str(error), kind="server_error", code=_snake(error))
    if isinstance(error, ExoKimiError):
        return ApiProblem(500, error.what, kind="server_error", code="internal_error")
    if (known := machine_error(error)) is not None:  # no descriptor or thread is left, say: another time there may be
        log.warning("a request was refused: %s", known.what)
        return ApiProblem(503, "the server's machine is out of resources", kind="server_error", code="overloaded")
    log.error("unexpected failure while answering a request", exc_info=error)
    return ApiProblem(500, "internal server error", kind="server_error", code="internal_error")


def from_validation(error: ValidationError, body: object) -> RequestError:
    """The first finding of pydantic in OpenAI's words, naming the field as the client wrote it.

    Args:
        error: what pydantic found.
        body: the parsed JSON that it looked at.
    """
    first = error.errors(include_url=False, include_context=False)[0]
    param = _written_path(first["loc"], body)
    if first["type"] == "missing":
        name = f"{param}.{first['loc'][-1]}" if param else str(first["loc"][-1])
        return RequestError(f"missing required parameter: '{name}'", param=name, code="missing_required_parameter")
    if first["type"] == "extra_forbidden":
        return RequestError(f"unknown parameter: '{param}'", param=param, code="unknown_parameter")
    code = "invalid_type" if first["type"].endswith("_type") else "invalid_value"
    reasons = list(dict.fromkeys(item["msg"] for item in error.errors() if _written_path(item["loc"], body) == param))
    return RequestError(f"invalid '{param}': {' or '.join(reasons)}", param=param or None, code=code)


def _written_path(loc: tuple[int | str, ...], body: object) -> str:
    """`messages[0].content`: the part of a location that exists in the body (pydantic adds the tags of its unions)."""
    path, value = "", body
    for step in loc:
        if isinstance(step, int) and isinstance(value, list) and step < len(value):
            path, value = f"{path}[{step}]", value[step]
        elif isinstance(step, str) and isinstance(value, dict) and step in value:
            path, value = f"{path}.{step}" if path else step, value[step]
        else:
            break
    return path


def _snake(error: BaseException) -> str:
    """`StageDiedError` -> `stage_died`: the code of an error that has no better one."""
    name = type(error).__name__.removesuffix("Error").removesuffix("Fault")
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    """Exception handler for everything that exo-kimi raises on purpose, and for what nobody foresaw."""
    return to_problem(error).response(request.url.path)


class ErrorAnswers:
    """ASGI middleware: whatever fails below is answered, and nothing is raised when an answer is whole.

    Starlette answers what has no handler of its own and raises it all the same; uvicorn then closes the connection, on which a
    client that has read its whole answer may just be sending the next request, and finds it reset.

    Args:
        app: what is below.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers in the place of `app` where it fails before it has begun to answer."""
        started, whole = False, False

        async def watching_send(message: Message) -> None:
            nonlocal started, whole
            started = True
            whole = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, watching_send)
        except Exception as error:
            if started and not whole:
                raise  # the connection has to end, or half an answer would look like all of it
            problem = to_problem(error)
            if not started:
                await problem.response(scope["path"])(scope, receive, send)


async def answer_http_error(request: Request, error: Exception) -> JSONResponse:
    """Exception handler for the router's own 404 and 405."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    where = f"{request.method} {path}"
    if error.status_code == 404:
        return ApiProblem(404, f"unknown URL: {where}", code="unknown_url").response(path)
    if error.status_code == 405:
        response = ApiProblem(405, f"method not allowed: {where}", code="method_not_supported").response(path)
        response.headers.update(error.headers or {})
        return response
    return ApiProblem(error.status_code, str(error.detail)).response(path)
