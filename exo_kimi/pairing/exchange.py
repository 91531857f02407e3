"""The exchange of a pairing, as messages in and out: SPAKE2, proofs of the same code, then the cluster key, sealed.

    serve -> stage   {"spake": A}
    stage -> serve   {"spake": B}
    serve -> stage   {"proof": HMAC}                    wrong: a try is gone, and the stage says no more than that
    stage -> serve   {"proof": HMAC, "sealed": its key or none}
    serve -> stage   {"sealed": the key of both}
    stage -> serve   {"sealed": done}

SPAKE2 makes a strong key of a short code: who listens learns nothing that a search over all codes could be held against, and who
takes part learns with each try whether one code is right. Nothing secret is sent before the other side's proof, and each
message is sealed with a key of its own.

Source: SPAKE2 (RFC 9382) over Ed25519 as python-spake2 has it; HKDF, HMAC-SHA256 and AES-256-GCM of cryptography.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from spake2 import SPAKE2_A, SPAKE2_B, SPAKEError

from exo_kimi.errors import PairingError
from exo_kimi.pairing.code import PairingCode

Side = Literal["serve", "stage"]
VERSION = 1
MOST_BYTES = 4096  # of one message
_NONCE = bytes(12)  # every key seals one message
_OTHER: dict[Side, Side] = {"serve": "stage", "stage": "serve"}


@dataclass(frozen=True, slots=True)
class PairedKeys:
    """Keys that both sides have when their codes are the same; `transcript` is a hash of the two messages of SPAKE2."""

    side: Side
    key: bytes
    transcript: bytes

    def proof(self) -> str:
        """That this side has the key."""
        return self._proof_of(self.side)

    def is_proof(self, text: object) -> bool:
        """Whether a text is the other side's proof."""
        return isinstance(text, str) and hmac.compare_digest(text.encode(), self._proof_of(_OTHER[self.side]).encode())

    def seal(self, purpose: str, message: Mapping[str, Any]) -> str:
        """Seal one message of this side; each purpose once."""
        data = json.dumps(message).encode()
        return AESGCM(self._derive(f"seal {self.side} {purpose}")).encrypt(_NONCE, data, self.transcript).hex()

    def unseal(self, purpose: str, text: object) -> Mapping[str, Any]:
        """Open a message of the other side.

        Raises:
            PairingError: it is none.
        """
        try:
            sealed = bytes.fromhex(text if isinstance(text, str) else "")
            cipher = AESGCM(self._derive(f"seal {_OTHER[self.side]} {purpose}"))
            message = json.loads(cipher.decrypt(_NONCE, sealed, self.transcript))
        except (ValueError, InvalidTag) as error:
            raise PairingError("a message of the pairing was changed on its way") from error
        if not isinstance(message, dict):
            raise PairingError("a message of the pairing cannot be read")
        return message

    def _proof_of(self, side: Side) -> str:
        return hmac.new(self._derive(f"proof {side}"), self.transcript, hashlib.sha256).hexdigest()

    def _derive(self, purpose: str) -> bytes:
        info = f"exo-kimi pairing {VERSION} {purpose}".encode()
        return HKDF(hashes.SHA256(), 32, salt=self.transcript, info=info).derive(self.key)


class CodeExchange:
    """One side of SPAKE2, for one try.

    Args:
        code: as this side knows it.
        side: which one this is.
    """

    def __init__(self, code: PairingCode, side: Side) -> None:
        kind = SPAKE2_A if side == "serve" else SPAKE2_B
        self._side: Side = side
        self._spake = kind(code.secret.encode(), idA=b"exo-kimi serve", idB=b"exo-kimi stage " + code.plate.encode())
        self._message: bytes = self._spake.start()

    @property
    def message(self) -> str:
        """What is sent to the other side."""
        return self._message.hex()

    def finish(self, text: object) -> PairedKeys:
        """The keys, from the other side's message; whether its code was the same, only its proof tells.

        Raises:
            PairingError: it is no such message.
        """
        try:
            other = bytes.fromhex(text if isinstance(text, str) else "")
            key = self._spake.finish(other)
        except (SPAKEError, ValueError, AssertionError, IndexError) as error:
            raise PairingError("a message of the pairing cannot be read") from error
        messages = (self._message, other) if self._side == "serve" else (other, self._message)
        return PairedKeys(self._side, key, hashlib.sha256(b"".join(messages)).digest())


def encode(message: Mapping[str, Any]) -> bytes:
    """A message as a line."""
    return json.dumps({"version": VERSION, **message}).encode() + b"\n"


def decode(line: bytes) -> Mapping[str, Any]:
    """A message from its line.

    Raises:
        PairingError: it is none, or of another version, or tells of the other side's error.
    """
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise PairingError(
            "something else than a pairing answers there", fix="start `exo-kimi stage --pair` on the other machine"
        )
    if "error" in message:
        raise PairingError(str(message["error"])[:200], fix=str(message.get("fix", ""))[:200] or None)
    if message.get("version") != VERSION:
        raise PairingError("the other machine pairs in another version", fix="install the same exo-kimi on both")
    return message
