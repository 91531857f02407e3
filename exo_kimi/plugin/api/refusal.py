"""An error of ours on its way through exo: one line of text in exo's error chunk, and the status that exo's API answers with.

exo's chunk has room for a message only, so status and code stand at its beginning: `exo-kimi (400 invalid_request): ...`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from exo_kimi.errors import ChatError, ContextLengthError, OverloadedError, RequestError, RuntimeFault

INTERNAL = "internal_error"
OVERLOADED = "overloaded"
CONTEXT = "context_length_exceeded"
_TEXT = re.compile(r"exo-kimi \((?P<status>[45]\d\d) (?P<code>[A-Za-z0-9_.-]+)\): (?P<message>.*)", re.DOTALL)
# How exo says that a runner died under a request. Source: exo `worker/runner/supervisor.py` at b5375f8ce.
_RUNNER_DIED = "Runner shutdown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a request got no answer.

    Args:
        status: HTTP status: 400 it can never be answered, 503 not now, 500 a mistake of ours or of exo.
        code: OpenAI's short machine-readable code.
        message: for a person; one or more lines.
    """

    status: int
    code: str
    message: str

    @classmethod
    def of(cls, error: BaseException) -> Refusal:
        """Of an error that ended a task."""
        if isinstance(error, OverloadedError):
            return cls(status=503, code=OVERLOADED, message=str(error))
        if isinstance(error, ContextLengthError):
            return cls(status=400, code=CONTEXT, message=str(error))
        if isinstance(error, RequestError):
            return cls(status=400, code=error.code, message=str(error))
        if isinstance(error, ChatError):  # without `where`: files of the node are none of the client's business
            message = f"{error.what}: {error.found}" if error.found else error.what
            return cls(status=400, code="invalid_value", message=message)
        if isinstance(error, RuntimeFault):
            return cls(status=503, code="engine_unavailable", message=str(error))
        return cls(status=500, code=INTERNAL, message=f"{type(error).__name__}: {error}")

    @classmethod
    def from_text(cls, text: str) -> Refusal:
        """Of the message of an error chunk, ours or exo's own."""
        if (found := _TEXT.fullmatch(text)) is not None:
            return cls(status=int(found["status"]), code=found["code"], message=found["message"])
        died = text.startswith(_RUNNER_DIED)
        return cls(
            status=503 if died else 500,
            code="engine_unavailable" if died else INTERNAL,
            message=text or "exo gave no reason",
        )

    def to_text(self) -> str:
        """For the message of an error chunk."""
        return f"exo-kimi ({self.status} {self.code}): {self.message}"
