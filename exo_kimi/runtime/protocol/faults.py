"""Errors of the protocol: a malformed frame; a stage's error as a message to the leader, and the same error back."""

from __future__ import annotations

from typing import TypeVar

from exo_kimi.errors import (
    CheckpointError,
    ExoKimiError,
    ProtocolError,
    RuntimeFault,
    StageError,
    StageOutOfMemoryError,
    StageUnreachableError,
    UsageError,
)
from exo_kimi.runtime.protocol.messages import FaultKind, StageFault

_Text = TypeVar("_Text", str, str | None)


class LinkBroken(StageUnreachableError):
    """A stage lost the next one: mostly the consequence of something that another stage is about to tell."""


_CLASSES: dict[FaultKind, type[RuntimeFault]] = {
    "oom": StageOutOfMemoryError,
    "error": StageError,
    "protocol": ProtocolError,
    "link": LinkBroken,
}


def malformed(what: str, *, expected: object, found: object) -> ProtocolError:
    """A ProtocolError about a frame; `found` is cut short, as it is a stranger's."""
    return ProtocolError(f"malformed frame: {what}"[:200], expected=expected, found=repr(found)[:200])


def to_message(error: ExoKimiError, epoch: int, step_id: int | None) -> StageFault:
    """An error as its fields; one that prints itself in its own way (a list of problems) as that text."""
    cause: FaultKind = "error"
    if isinstance(error, StageOutOfMemoryError):
        cause = "oom"
    elif isinstance(error, ProtocolError):
        cause = "protocol"
    elif isinstance(error, StageUnreachableError):
        cause = "link"
    elif isinstance(error, CheckpointError | UsageError):
        cause = "checkpoint"
    if type(error).__str__ is not ExoKimiError.__str__:
        return StageFault(epoch=epoch, step_id=step_id, cause=cause, what=unicode_text(str(error)))
    return StageFault(
        epoch=epoch,
        step_id=step_id,
        cause=cause,
        what=unicode_text(error.what),
        expected=unicode_text(error.expected),
        found=unicode_text(error.found),
        where=unicode_text(error.where),
        fix=unicode_text(error.fix),
    )


def unicode_text(text: _Text) -> _Text:
    """A text with the names of files escaped that are no UTF-8: JSON cannot hold them, and the error must arrive."""
    return text.encode(errors="backslashreplace").decode() if text is not None else text


def from_message(fault: StageFault, *, stage: int, address: str) -> ExoKimiError:
    """The error of a message, with the stage that sent it."""
    what = fault.what if f"stage {stage}" in fault.what else f"stage {stage}: {fault.what.removeprefix('stage None ')}"
    where = fault.where or address
    if fault.cause == "checkpoint":
        return CheckpointError(what, expected=fault.expected, found=fault.found, where=where, fix=fault.fix)
    cls = _CLASSES[fault.cause]
    return cls(what, stage=stage, expected=fault.expected, found=fault.found, where=where, fix=fault.fix)
