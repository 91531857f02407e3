"""Request bodies read into JSON values that are safe to work with: bounded in size and depth, with finite numbers."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from exo_kimi.errors import RequestError
from exo_kimi.serve.problems import ApiProblem

MAX_DEPTH = 100
# What a web page may send to a server on loopback without asking it first: refused, so that no page can run the model.
FORM_TYPES = frozenset({"text/plain", "application/x-www-form-urlencoded", "multipart/form-data"})


async def read_json(request: Request, *, max_bytes: int) -> dict[str, Any]:
    """The JSON object in a request's body.

    Raises:
        ApiProblem: 408 for a body that never came whole, 413 for one over `max_bytes`, 415 for one that says it is a form,
            or that a web page sends untyped.
        RequestError: not UTF-8, not JSON, not an object, nested over 100 levels, or a number or text that JSON forbids.
    """
    declared = request.headers.get("content-type", "").split(";")[0].strip().lower()
    # A page can also send bytes of no type at all; only browsers tell an origin.
    if declared in FORM_TYPES or (not declared and "origin" in request.headers):
        raise ApiProblem(
            415,
            f"the body must be JSON: send `Content-Type: application/json` (found {declared or 'none'})",
            code="unsupported_media_type",
        )
    return parse_object(await _read(request, max_bytes))


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`.

    Raises:
        RequestError: as `read_json`.
    """
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise _malformed(f"the body is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise _malformed(f"the body is not JSON: {error.msg} (line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise _malformed(f"the body is nested over {MAX_DEPTH} levels") from None
    except ValueError as error:  # an integer of thousands of digits
        raise _malformed(f"the body is not usable JSON: {error}") from None
    if not isinstance(value, dict):
        raise _malformed(f"the body must be a JSON object, found {type(value).__name__}")
    _check_values(value)
    return value


async def _read(request: Request, max_bytes: int) -> bytes:
    too_large = ApiProblem(
        413, f"the body is over {max_bytes} bytes, which is this server's limit", code="request_too_large"
    )
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > max_bytes:
        raise too_large
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > max_bytes:
                raise too_large
            parts.append(part)
    except ClientDisconnect:  # the client left, or `connections` gave it up: nobody reads this, the metrics count it
        raise ApiProblem(408, "the body of the request did not arrive", code="request_timeout") from None
    return b"".join(parts)


def _check_values(value: object) -> None:
    """Walks all values without recursion: depth, finite numbers, text that UTF-8 can hold."""
    stack: list[tuple[object, int]] = [(value, 1)]
    while stack:
        item, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise _malformed(f"the body is nested over {MAX_DEPTH} levels")
        if isinstance(item, dict):
            stack += [(child, depth + 1) for pair in item.items() for child in pair]
        elif isinstance(item, list):
            stack += [(child, depth + 1) for child in item]
        elif isinstance(item, str) and not _encodable(item):
            raise _malformed("a text in the body holds half of a surrogate pair")
        elif isinstance(item, float) and not math.isfinite(item):
            raise _malformed("a number in the body is too large")


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _refuse_constant(name: str) -> NoReturn:
    raise _malformed(f"the body is not JSON: {name} is not a JSON number")


def _malformed(what: str) -> RequestError:
    return RequestError(what, code="invalid_json")
