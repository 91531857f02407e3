"""Messages as lists of byte parts and back: a JSON header with version, kind and epoch, then raw buffers. No pickle.

Whatever the bytes, `decode` returns a message or raises ProtocolError. It knows nothing of sockets.

    [header JSON] [buffer] [buffer] ...      numbers in buffers are little-endian
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from exo_kimi.errors import ProtocolError
from exo_kimi.runtime.protocol import json_fields as fields
from exo_kimi.runtime.protocol.messages import CONTROL_KINDS, Control
from exo_kimi.runtime.protocol.step_frames import decode_result, decode_step, encode_result, encode_step
from exo_kimi.runtime.steps import Step, StepResult
from exo_kimi.runtime.transport.link import MAX_PART_BYTES
from exo_kimi.runtime.transport.link import Part as Part

PROTOCOL_VERSION = 4
MAX_HEADER_BYTES = 8 << 20  # 64 sequences with a logit bias of 1,000 tokens each take 1 MB
MAX_PARTS = 16_384

Message = Step | StepResult | Control
_CONTROL_NAMES = {cls: name for name, cls in CONTROL_KINDS.items()}


def encode(message: Message) -> list[Part]:
    """Byte parts of a message.

    Raises:
        ProtocolError: a value that no frame can hold (such as a NaN temperature), or a frame that is too big.
    """
    if isinstance(message, Step):
        kind, body, buffers = "step", *encode_step(message)
    elif isinstance(message, StepResult):
        kind, body, buffers = "step_result", *encode_result(message)
    else:
        kind, body, buffers = _CONTROL_NAMES[type(message)], dataclasses.asdict(message), []
    header = {"version": PROTOCOL_VERSION, "kind": kind, "epoch": getattr(message, "epoch", 0)} | body
    try:
        text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    except ValueError as error:
        raise fields.bad("a number that JSON cannot hold", expected="finite numbers", found=str(error)) from error
    parts = [text, *buffers]
    _check_sizes(parts)
    return parts


def decode(parts: Sequence[Part]) -> Message:
    """The message of a list of byte parts. Buffers are not copied: the message keeps the parts alive.

    Raises:
        ProtocolError: another protocol version (the message has both), or anything that is not a well-formed message.
    """
    if not parts:
        raise fields.bad("no parts", expected="a header", found=list(parts))
    _check_sizes(parts)
    try:
        header = fields.mapping(json.loads(bytes(parts[0])), "header")
    except (ValueError, RecursionError) as error:
        raise fields.bad("the header is not JSON", expected="a JSON object", found=bytes(parts[0][:80])) from error
    version = header.get("version")
    if version != PROTOCOL_VERSION or type(version) is not int:
        raise ProtocolError(
            "the other side speaks another version of the protocol",
            expected=f"version {PROTOCOL_VERSION} (this side)",
            found=f"version {version!r}"[:100] + " (the other side)",
            fix="install the same version of exo-kimi on every machine",
        )
    kind = header.get("kind")
    if kind == "step":
        return decode_step(header, parts[1:])
    if kind == "step_result":
        return decode_result(header, parts[1:])
    if not isinstance(kind, str) or kind not in CONTROL_KINDS:
        raise fields.bad("unknown kind", expected="a known kind", found=kind)
    if len(parts) > 1:
        raise fields.bad("buffers after a control message", expected="1 part", found=len(parts))
    return fields.record(CONTROL_KINDS[kind], header)


def _check_sizes(parts: Sequence[Part]) -> None:
    sizes = [part.nbytes if isinstance(part, memoryview) else len(part) for part in parts]
    if len(parts) > MAX_PARTS or sizes[0] > MAX_HEADER_BYTES or max(sizes) > MAX_PART_BYTES:
        raise ProtocolError(
            "the frame is too big",
            expected=f"at most {MAX_PARTS} parts, a header of {MAX_HEADER_BYTES} and parts of {MAX_PART_BYTES} bytes",
            found=f"{len(parts)} parts, a header of {sizes[0]} and parts of up to {max(sizes)} bytes",
        )
