"""Request bodies read into JSON values that are safe to work with: bounded in bytes, depth, values and text."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from starlette.requests import ClientDisconnect, Request

from exo_kimi.errors import ContextLengthError, RequestError
from exo_kimi.serve.problems import ApiProblem
from exo_kimi.serve.workers import SMALL_BYTES, HeldBytes, Workers

MAX_BODY_BYTES = 16 * 2**20  # 64 bytes for each token of the longest Kimi's context
MAX_HELD_BYTES = 96 * 2**20
PICTURE_BYTES = 48 * 2**20
"""What pictures add to all of these bounds, on servers that take them: as base64, a third more than the files."""
MAX_DEPTH = 100
# `[ ] { } : ,` outside of texts. A parser holds the GIL until it is done, and makes an object at every second of them.
MAX_STRUCTURAL_CHARACTERS = 2**19
_INLINE_BYTES = 2**14  # read in a millisecond, less than a thread takes to be heard
# What a web page may send to a server on loopback without asking it first: refused, so that no page can run the model.
FORM_TYPES = frozenset({"text/plain", "application/x-www-form-urlencoded", "multipart/form-data"})
# A whole string, which goes; or one that the piece cuts off, of which the quote and half an escape stay.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"|(")(?:[^"\\]++|\\.)*+(\\?)\Z', re.DOTALL)
_REST_OF_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_NOT_STRUCTURAL = bytes(set(range(256)) - set(b"[]{}:,"))

Parsed = TypeVar("Parsed")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextBound:
    """The most text that a context can hold.

    Args:
        context: in tokens.
        token_bytes: of the longest token.
        picture_bytes: of texts that are pictures in truth.
    """

    context: int
    token_bytes: int
    picture_bytes: int = 0

    @property
    def most_bytes(self) -> int:
        """UTF-8 bytes of all texts of a request; names and notes that never reach the model have some room beside."""
        return self.context * self.token_bytes + SMALL_BYTES + self.picture_bytes

    def check(self, text_bytes: int) -> None:
        """Raises:
        ContextLengthError: so much text is over the context, however it is divided into tokens.
        """
        if text_bytes > self.most_bytes:
            raise ContextLengthError(
                "the request has more text than the context can hold",
                code="context_length_exceeded",
                expected=f"at most {self.most_bytes} bytes (a context of {self.context} tokens of at most {self.token_bytes})",
                found=f"{text_bytes} bytes",
            )


class BodyReader:
    """Reads the bodies of requests for every route of a server, within bounds that hold for each and for all together.

    Args:
        workers: parse what is not small.
        bound: the most text now; the context may only be known once the stages are ready.
        max_bytes: of one body, pictures apart.
        picture_bytes: more for pictures, in one body and in all together.
    """

    def __init__(
        self,
        workers: Workers,
        bound: Callable[[], TextBound],
        *,
        max_bytes: int = MAX_BODY_BYTES,
        picture_bytes: int = 0,
    ) -> None:
        self._workers = workers
        self._bound = bound
        self._max_bytes = max_bytes + picture_bytes
        self._held = HeldBytes(MAX_HELD_BYTES + picture_bytes)

    async def read(self, request: Request, parse: Callable[[dict[str, Any]], Parsed]) -> Parsed:
        """What `parse` makes of the JSON object in a request's body; beyond a few KB in a thread.

        Raises:
            ApiProblem: 408 for a body that never came whole, 413 for one that is too large, 415 for one that says it is a
                form, or that a web page sends untyped, 503 when other bodies take all memory that there is for them.
            RequestError: not UTF-8, not JSON, not an object, nested over 100 levels, too many values, or a number or text
                that JSON forbids; what `parse` raises.
            ContextLengthError: more text than the context can hold.
        """
        _check_type(request)
        bound = self._bound()
        async with self._held.counting() as grow:
            data = await self._collect(request, grow)

            def work() -> Parsed:
                value = parse_object(data, bound=bound)
                data.clear()
                return parse(value)

            if len(data) <= _INLINE_BYTES:
                return work()
            return await self._workers.run(request, work)

    async def _collect(self, request: Request, grow: Callable[[int], None]) -> bytearray:
        too_large = ApiProblem(
            413, f"the body is over {self._max_bytes} bytes, which is this server's limit", code="request_too_large"
        )
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > self._max_bytes:
            raise too_large
        data, meter, metered = bytearray(), StructureMeter(), 0
        try:
            async for part in request.stream():
                if len(data) + len(part) > self._max_bytes:
                    raise too_large
                grow(len(data) + len(part))
                data += part
                if len(data) > SMALL_BYTES:
                    meter.feed(bytes(memoryview(data)[metered:]))
                    metered = len(data)
        except (
            ClientDisconnect
        ):  # the client left, or `connections` gave it up: nobody reads this, the metrics count it
            raise ApiProblem(408, "the body of the request did not arrive", code="request_timeout") from None
        request.state.body_bytes = len(data)
        return data


def _check_type(request: Request) -> None:
    declared = request.headers.get("content-type", "").split(";")[0].strip().lower()
    # A page can also send bytes of no type at all; only browsers tell an origin.
    if declared in FORM_TYPES or (not declared and "origin" in request.headers):
        raise ApiProblem(
            415,
            f"the body must be JSON: send `Content-Type: application/json` (found {declared or 'none'})",
            code="unsupported_media_type",
        )


class StructureMeter:
    """Counts JSON's structural characters in a text that arrives in pieces, before it is parsed."""

    def __init__(self) -> None:
        self.count = 0
        self._in_string = False
        self._escaped = False

    def feed(self, data: bytes) -> None:
        """Count on.

        Raises:
            RequestError: there are too many.
        """
        start = 0
        if self._in_string:
            start = self._end_of_string(data, 1 if self._escaped and data else 0)
        if self._in_string:
            return
        outside = _STRING.sub(rb"\1\2", data[start:])
        self._escaped = outside.endswith(b'"\\')
        self._in_string = self._escaped or outside.endswith(b'"')
        self.count += len(outside.translate(None, _NOT_STRUCTURAL))
        if self.count > MAX_STRUCTURAL_CHARACTERS:
            raise _malformed(
                f"the body has too many values: over {MAX_STRUCTURAL_CHARACTERS} of the characters [ ] {{ }} : and ,"
            )

    def _end_of_string(self, data: bytes, start: int) -> int:
        """Behind the string around `start`; the end of `data` if it goes on."""
        match = _REST_OF_STRING.match(data, start)
        end = start if match is None else match.end()
        self._escaped = data[end : end + 1] == b"\\"  # and the character that it escapes is still to come
        self._in_string = data[end : end + 1] != b'"'
        return len(data) if self._in_string else end + 1


def parse_object(data: bytes | bytearray, *, bound: TextBound | None = None) -> dict[str, Any]:
    """The JSON object in `data`.

    Raises:
        RequestError, ContextLengthError: as `BodyReader.read`.
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
    text_bytes = _check_values(value)
    if bound is not None:
        bound.check(text_bytes)
    return value


def _check_values(value: object) -> int:
    """Walks all values without recursion: depth, finite numbers, text that UTF-8 can hold; returns the bytes of all texts."""
    text_bytes = 0
    stack: list[tuple[object, int]] = [(value, 1)]
    while stack:
        item, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise _malformed(f"the body is nested over {MAX_DEPTH} levels")
        if isinstance(item, dict):
            stack += [(child, depth + 1) for pair in item.items() for child in pair]
        elif isinstance(item, list):
            stack += [(child, depth + 1) for child in item]
        elif isinstance(item, str):
            text_bytes += _utf8_bytes(item)
        elif isinstance(item, float) and not math.isfinite(item):
            raise _malformed("a number in the body is too large")
    return text_bytes


def _utf8_bytes(text: str) -> int:
    if text.isascii():
        return len(text)
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError:
        raise _malformed("a text in the body holds half of a surrogate pair") from None


def _refuse_constant(name: str) -> NoReturn:
    raise _malformed(f"the body is not JSON: {name} is not a JSON number")


def _malformed(what: str) -> RequestError:
    return RequestError(what, code="invalid_json")
