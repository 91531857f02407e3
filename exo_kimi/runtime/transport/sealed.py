"""A TCP connection whose records are sealed with AES-256-GCM, for bytes in bulk.

CURVE, as libzmq has it, seals 100 to 160 MB/s a core, and AES-GCM with the processor's instructions 4 to 12 GB/s, where nothing
is allocated for a record: pages of fresh memory cost seven times as much as the cipher. So a CURVE link hands over a fresh key
for one session, and weights go over connections of that session. Each direction of each connection has a key of its own,
derived by HKDF; nonces count records, so none comes twice, and what is replayed, dropped or swapped fails to open. A session
takes no connection number twice.

A record is 3 bytes of little-endian length and one of its kind, then the sealed bytes; the four are authenticated with them.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from exo_kimi.errors import ProtocolError

MOST_RECORD_BYTES = 1 << 20
ID_BYTES = 16
KEY_BYTES = 32
NUMBER_BYTES = 8
_LENGTH_BYTES, _KIND_SHIFT, _TAG_BYTES = 4, 24, 16
_BUFFER_BYTES = _LENGTH_BYTES + MOST_RECORD_BYTES + _TAG_BYTES


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

    def _derive(self, number: int, direction: bytes) -> AES:
        info = b"exo-kimi share 1 " + direction + number.to_bytes(NUMBER_BYTES, "little")
        return AES(HKDF(hashes.SHA256(), KEY_BYTES, salt=self.id, info=info).derive(self.secret))


class SealedStream:
    """Records over a blocking socket, one side sending while the other receives.

    Args:
        connection: closed by `close`.
        seal: key of what is sent.
        unseal: key of what is received.
    """

    def __init__(self, connection: socket.socket, *, seal: AES, unseal: AES) -> None:
        self._connection = connection
        self._seal, self._unseal = seal, unseal
        self._sent = self._received = 0
        self._out, self._in, self._data = (bytearray(_BUFFER_BYTES) for _ in range(3))

    def send(self, data: bytes | memoryview, kind: int = 0) -> None:
        """Send one record.

        Args:
            data: at most `MOST_RECORD_BYTES`.
            kind: what it is, 0 to 255; authenticated, not secret.

        Raises:
            OSError: the connection is lost, or its timeout passed.
        """
        if len(data) > MOST_RECORD_BYTES:
            raise ProtocolError("a record that is too long", found=f"{len(data):,} bytes")
        head = (kind << _KIND_SHIFT | len(data) + _TAG_BYTES).to_bytes(_LENGTH_BYTES, "little")
        cipher = Cipher(self._seal, GCM(_nonce(self._sent))).encryptor()
        self._sent += 1
        cipher.authenticate_additional_data(head)
        out, end = memoryview(self._out), _LENGTH_BYTES + len(data)
        out[:_LENGTH_BYTES] = head
        cipher.update_into(data, out[_LENGTH_BYTES:])
        cipher.finalize()
        out[end : end + _TAG_BYTES] = cipher.tag
        try:
            self._connection.sendall(out[: end + _TAG_BYTES])
        except BlockingIOError:
            raise TimeoutError("the other side took nothing") from None

    def receive(self) -> tuple[int, memoryview]:
        """The kind and the data of the next record; the data lasts until the next call.

        Raises:
            OSError: the connection is lost, or its timeout passed.
            ProtocolError: it is none that the other side of the session has sealed as its next one.
        """
        view = memoryview(self._in)
        self._fill(view[:_LENGTH_BYTES])
        head = bytes(view[:_LENGTH_BYTES])
        kind, length = divmod(int.from_bytes(head, "little"), 1 << _KIND_SHIFT)
        if not _TAG_BYTES <= length <= MOST_RECORD_BYTES + _TAG_BYTES:
            raise ProtocolError("a sealed record of another length", found=f"{length:,} bytes")
        sealed = view[_LENGTH_BYTES : _LENGTH_BYTES + length]
        self._fill(sealed)
        cipher = Cipher(self._unseal, GCM(_nonce(self._received))).decryptor()
        cipher.authenticate_additional_data(head)
        count = cipher.update_into(sealed[:-_TAG_BYTES], self._data)
        try:
            cipher.finalize_with_tag(bytes(sealed[-_TAG_BYTES:]))
        except InvalidTag:
            raise ProtocolError("a sealed record was changed on its way, or is not of this session") from None
        self._received += 1
        return kind, memoryview(self._data)[:count]

    def set_timeout(self, seconds: float | None) -> None:
        """How long one call waits for the other side; None is for ever.

        The system counts it: a timeout of Python's makes every record several calls of `poll` and `recv`.
        """
        self._connection.settimeout(None)
        whole, part = divmod(seconds or 0.0, 1)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._connection.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", int(whole), int(part * 1e6)))

    def end(self) -> None:
        """End the connection, from any thread: a call that waits fails at once. `close` is still to come."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection; idempotent."""
        self._connection.close()

    def _fill(self, view: memoryview) -> None:
        while view:
            try:
                count = self._connection.recv_into(view, 0, socket.MSG_WAITALL)
            except BlockingIOError:
                raise TimeoutError("the other side was silent") from None
            if not count:
                raise ConnectionError("the connection ended")
            view = view[count:]


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "little")
