"""A TCP connection whose records are sealed with AES-256-GCM, for bytes in bulk.

CURVE, as libzmq has it, seals 100 to 160 MB/s a core, and AES-GCM with the processor's instructions some 4 GB/s. So a CURVE link
hands over a fresh key for one session, and weights go over connections of that session. Each direction of each connection has
a key of its own, derived by HKDF; nonces count records, so none comes twice, and what is replayed, dropped or
swapped fails to open. A session takes no connection number twice.

A record is 3 bytes of little-endian length and one of its kind, then the sealed bytes; the four are authenticated with them.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from exo_kimi.errors import ProtocolError

MOST_RECORD_BYTES = 1 << 20
ID_BYTES = 16
KEY_BYTES = 32
NUMBER_BYTES = 8
_LENGTH_BYTES, _KIND_SHIFT, _TAG_BYTES = 4, 24, 16


@dataclass(frozen=True, slots=True)
class SessionKey:
    """What both sides of a session know: its public id and its secret. The secret is never printed by repr."""

    id: bytes
    secret: bytes = field(repr=False)

    @classmethod
    def generate(cls) -> SessionKey:
        """A new random one."""
        return cls(os.urandom(ID_BYTES), os.urandom(KEY_BYTES))

    def stream(self, connection: socket.socket, number: int, *, listens: bool) -> SealedStream:
        """The sealed stream of one connection of the session.

        Args:
            connection: open, behind its first bytes.
            number: of the connection; each only once in a session.
            listens: whether this is the side that accepted it.
        """
        up, down = (self._derive(number, direction) for direction in (b"up", b"down"))
        return SealedStream(connection, seal=down if listens else up, unseal=up if listens else down)

    def _derive(self, number: int, direction: bytes) -> AESGCM:
        info = b"exo-kimi share 1 " + direction + number.to_bytes(NUMBER_BYTES, "little")
        return AESGCM(HKDF(hashes.SHA256(), KEY_BYTES, salt=self.id, info=info).derive(self.secret))


class SealedStream:
    """Records over a blocking socket, one side sending while the other receives.

    Args:
        connection: closed by `close`.
        seal: of what is sent.
        unseal: of what is received.
    """

    def __init__(self, connection: socket.socket, *, seal: AESGCM, unseal: AESGCM) -> None:
        self._connection = connection
        self._seal, self._unseal = seal, unseal
        self._sent = self._received = 0
        self._buffer = bytearray(_LENGTH_BYTES + MOST_RECORD_BYTES + _TAG_BYTES)

    def send(self, data: bytes, kind: int = 0) -> None:
        """Send one record.

        Args:
            data: at most `MOST_RECORD_BYTES`.
            kind: what it is, 0 to 255; authenticated, not secret.

        Raises:
            OSError: the connection is lost, or its timeout passed.
        """
        head = (kind << _KIND_SHIFT | len(data) + _TAG_BYTES).to_bytes(_LENGTH_BYTES, "little")
        sealed = memoryview(self._seal.encrypt(_nonce(self._sent), data, head))
        self._sent += 1
        # Both in one call: a copy to put them together would be a tenth of the work.
        sent = self._connection.sendmsg([head, sealed])
        if sent < _LENGTH_BYTES:
            self._connection.sendall(head[sent:])
        self._connection.sendall(sealed[max(0, sent - _LENGTH_BYTES) :])

    def receive(self) -> tuple[int, bytes]:
        """The kind and the data of the next record.

        Raises:
            OSError: the connection is lost, or its timeout passed.
            ProtocolError: it is none that the other side of the session has sealed as its next one.
        """
        view = memoryview(self._buffer)
        self._fill(view[:_LENGTH_BYTES])
        head = bytes(view[:_LENGTH_BYTES])
        kind, length = divmod(int.from_bytes(head, "little"), 1 << _KIND_SHIFT)
        if not _TAG_BYTES <= length <= MOST_RECORD_BYTES + _TAG_BYTES:
            raise ProtocolError("a sealed record of another length", found=f"{length:,} bytes")
        sealed = view[_LENGTH_BYTES : _LENGTH_BYTES + length]
        self._fill(sealed)
        try:
            data = self._unseal.decrypt(_nonce(self._received), sealed, head)
        except InvalidTag:
            raise ProtocolError("a sealed record was changed on its way, or is not of this session") from None
        self._received += 1
        return kind, data

    def set_timeout(self, seconds: float) -> None:
        """How long one call waits for the other side."""
        self._connection.settimeout(seconds)

    def close(self) -> None:
        """Close the connection; idempotent."""
        self._connection.close()

    def _fill(self, view: memoryview) -> None:
        while view:
            count = self._connection.recv_into(view)
            if not count:
                raise ConnectionError("the connection ended")
            view = view[count:]


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "little")
