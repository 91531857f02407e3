"""What a render process is asked and what it answers.

A message is 8 bytes of length and as many bytes. A request is the parent's, so it is marshalled. An answer is text, because
whoever broke out of a template could write anything: b"t" and the rendered text, or b"f" and JSON of a failure.
"""

from __future__ import annotations

import json
import marshal
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

LENGTH_BYTES = 8
MAX_RENDERED_CHARS = 32 * 2**20  # a template that repeats its input this often is broken or hostile
MAX_ANSWER_BYTES = 4 * MAX_RENDERED_CHARS + 1
_TEXT, _FAILURE = b"t", b"f"
_MAX_FOUND_CHARS = 2000
_LIMITS = struct.Struct("<dQ")  # seconds, bytes

FailureKind = Literal["compile", "refused", "failed", "limit"]


class RenderFailure(Exception):
    """Why there is no text.

    Args:
        kind: the template does not compile; refused the messages; failed on them; wants too much time, memory or text.
        found: in the words of the template or of Jinja.
        line: of the template, when it is known.
    """

    def __init__(self, kind: FailureKind, found: str, line: int | None = None) -> None:
        super().__init__(found)
        self.kind: FailureKind = kind
        self.found = found
        self.line = line


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderLimits:
    """What one rendering may take, the longest conversations included: those of a megabyte take a tenth of a second.

    Args:
        cpu_s: processor time; for each byte of the request, `cpu_s_per_byte` more.
        memory_bytes: beside what the process has when it starts; for each byte of the request, `memory_per_byte` more.
    """

    cpu_s: float = 2.0
    cpu_s_per_byte: float = 1.0 / 2**20
    memory_bytes: int = 256 * 2**20
    memory_per_byte: int = 16

    def of(self, size_bytes: int) -> tuple[float, int]:
        """Seconds and bytes for a request of this size."""
        return self.cpu_s + self.cpu_s_per_byte * size_bytes, self.memory_bytes + self.memory_per_byte * size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderRequest:
    """One rendering and its limits.

    Args:
        source: of the template.
        variables: JSON values.
        cpu_s: of processor time.
        memory_bytes: beside what the process has when it starts.
    """

    source: str
    variables: Mapping[str, Any]
    cpu_s: float
    memory_bytes: int

    @classmethod
    def unpack(cls, data: bytes) -> RenderRequest:
        """What `pack_request` packed."""
        cpu_s, memory_bytes = _LIMITS.unpack_from(data)
        source, variables = marshal.loads(memoryview(data)[_LIMITS.size :])
        return cls(source=source, variables=variables, cpu_s=cpu_s, memory_bytes=memory_bytes)


def pack_request(source: str, variables: Mapping[str, Any], limits: RenderLimits) -> bytes:
    """For `RenderRequest.unpack`.

    Raises:
        ValueError: the variables are nested too deep, or no JSON values.
    """
    data = marshal.dumps((source, dict(variables)))
    return _LIMITS.pack(*limits.of(len(data))) + data


def pack_text(text: str) -> bytes:
    """An answer: the rendered text."""
    return _TEXT + text.encode("utf-8", "surrogatepass")


def pack_failure(failure: RenderFailure) -> bytes:
    """An answer: why there is none."""
    return _FAILURE + json.dumps([failure.kind, failure.found[:_MAX_FOUND_CHARS], failure.line]).encode()


def unpack_answer(data: bytes) -> str:
    """The rendered text.

    Raises:
        RenderFailure: there is none.
        ValueError: it is no answer.
    """
    if data[:1] == _TEXT:
        return data[1:].decode("utf-8", "surrogatepass")
    kind, found, line = json.loads(data[1:])
    if data[:1] != _FAILURE or kind not in get_args(FailureKind) or not isinstance(found, str):
        raise ValueError("no answer of a render process")
    raise RenderFailure(kind, found, line if isinstance(line, int) else None)
