"""Messages as lists of byte parts and back: a JSON header with version and kind, then raw buffers. No pickle.

Whatever the bytes, `decode` returns a message or raises ProtocolError.

    [header JSON] [buffer] [buffer] ...      numbers in buffers are little-endian
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import get_args

import msgspec

from exo_kimi.errors import ProtocolError
from exo_kimi.runtime.protocol.faults import malformed
from exo_kimi.runtime.protocol.messages import (
    CONTROL_KINDS,
    PROTOCOL_VERSION,
    Backend,
    Control,
    FaultKind,
    FreeScope,
    LinkKind,
    Role,
)
from exo_kimi.runtime.protocol.step_frames import (
    COLUMNS,
    ResultHeader,
    StepHeader,
    check_finite,
    decode_result,
    decode_step,
    encode_result,
    encode_step,
)
from exo_kimi.runtime.requests import StageState
from exo_kimi.runtime.steps import HiddenDtype, Step, StepResult
from exo_kimi.runtime.transport.link import MAX_PART_BYTES
from exo_kimi.runtime.transport.link import Part as Part

MAX_HEADER_BYTES = 8 << 20  # 64 sequences with a logit bias of 1,000 tokens each take 1 MB
MAX_PARTS = 16_384

Message = Step | StepResult | Control


class _AnyHeader(msgspec.Struct):
    """What can be read of a header of any version."""

    version: object = None


_version = msgspec.json.Decoder(_AnyHeader)
_header: msgspec.json.Decoder[StepHeader | ResultHeader | Control] = msgspec.json.Decoder(
    StepHeader | ResultHeader | Control
)
_encoder = msgspec.json.Encoder()
_CHOICES = {
    "kind": ("step", "step_result", *CONTROL_KINDS),
    "role": get_args(Role),
    "state": get_args(StageState),
    "cause": get_args(FaultKind),
    "free_scope": get_args(FreeScope),
    "link": get_args(LinkKind),
    "backend": get_args(Backend),
    "dtype": get_args(HiddenDtype),
}
"""Values of members that take few; msgspec does not tell them."""


def encode(message: Message) -> list[Part]:
    """Byte parts of a message.

    Raises:
        ProtocolError: a value that no frame can hold (such as a NaN temperature), or a frame that is too big.
    """
    header: StepHeader | ResultHeader | Control
    buffers: list[Part] = []
    try:
        if isinstance(message, Step):
            header, buffers = encode_step(message)
        elif isinstance(message, StepResult):
            header, buffers = encode_result(message)
        else:
            header = message
            check_finite(msgspec.structs.astuple(message), type(message).__name__)
        parts = [_encoder.encode(header), *buffers]
    except (msgspec.MsgspecError, ValueError, OverflowError) as error:  # ValueError: text that is no Unicode
        raise malformed("a value that JSON cannot hold", expected="values within bounds", found=error) from error
    _check_sizes(parts)
    return parts


def decode(parts: Sequence[Part]) -> Message:
    """The message of a list of byte parts. Buffers are not copied: the message keeps the parts alive.

    Raises:
        ProtocolError: another protocol version (the message has both), or anything that is not a well-formed message.
    """
    if not parts:
        raise malformed("no parts", expected="a header", found=list(parts))
    _check_sizes(parts)
    try:
        # By itself and first: of another version, nothing else is known.
        _check_version(_version.decode(parts[0]).version)
        header = _header.decode(parts[0])
    except msgspec.ValidationError as error:
        raise _explained(error, parts[0]) from error
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise malformed(
            "the header is not JSON", expected="a JSON object", found=f"{bytes(parts[0][:80])!r} ({error})"
        ) from error
    if isinstance(header, StepHeader):
        return decode_step(header, parts[1:])
    if isinstance(header, ResultHeader):
        return decode_result(header, parts[1:])
    if len(parts) > 1:
        raise malformed("buffers after a control message", expected="1 part", found=len(parts))
    return header


def _check_version(version: object) -> None:
    if version != PROTOCOL_VERSION or type(version) is not int:
        raise ProtocolError(
            "the other side speaks another version of the protocol",
            expected=f"version {PROTOCOL_VERSION} (this side)",
            found=f"version {version!r}"[:100] + " (the other side)",
            fix="install the same version of exo-kimi on every machine",
        )


def _explained(error: msgspec.ValidationError, header: Part) -> ProtocolError:
    """The error with the member's name and the value that was there; msgspec tells what it expected and a path."""
    problem, _, path = str(error).partition(" - at `$")
    steps = re.findall(r"\.(\w+)|\[(\d+)\]", path)
    try:
        found = msgspec.json.decode(header)
        for member, index in steps:
            found = found[member or int(index)]
    # Not JSON beyond that place, or a member twice.
    except (msgspec.MsgspecError, ValueError, LookupError, TypeError, RecursionError):
        found = bytes(header[:80])
    name = _name(steps)
    if problem.startswith("Object missing"):
        return malformed(f"{name}: a member is missing", expected=problem.split("`")[1], found=_members(found))
    if problem.startswith("Object contains"):
        return malformed(f"{name}: an unknown member", expected=f"no {problem.split('`')[1]}", found=_members(found))
    choices = _CHOICES.get(name.rpartition(".")[2], ())
    expected = " or ".join(choices) if problem.startswith("Invalid") and choices else problem.removeprefix("Expected ")
    return malformed(name, expected=expected, found=found)


def _members(found: object) -> object:
    return sorted(found)[:20] if isinstance(found, dict) else found


def _name(steps: Sequence[tuple[str, str]]) -> str:
    """The members and indices on the way to a value; in a row, what its columns are called."""
    name = shape = ""
    for member, index in steps:
        label = member or (COLUMNS[shape][int(index)] if shape in COLUMNS else "")
        name += f".{label}" if label else f"[{index}]"
        shape = f"{shape}.{label}".removeprefix(".") if label else f"{shape}[]"
    return name.removeprefix(".") or "header"


def _check_sizes(parts: Sequence[Part]) -> None:
    sizes = [part.nbytes if isinstance(part, memoryview) else len(part) for part in parts]
    if len(parts) > MAX_PARTS or sizes[0] > MAX_HEADER_BYTES or max(sizes) > MAX_PART_BYTES:
        raise ProtocolError(
            "the frame is too big",
            expected=f"at most {MAX_PARTS} parts, a header of {MAX_HEADER_BYTES} and parts of {MAX_PART_BYTES} bytes",
            found=f"{len(parts)} parts, a header of {sizes[0]} and parts of up to {max(sizes)} bytes",
        )
