"""The side that shows the code: it waits at its stage's address until one machine has proved it, or three have proved another."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exo_kimi.errors import AddressError, ExoKimiError, PairingError
from exo_kimi.pairing.code import PairingCode
from exo_kimi.pairing.exchange import MOST_BYTES, CodeExchange, decode, encode
from exo_kimi.runtime.transport.address import Address
from exo_kimi.runtime.transport.keys import ClusterKey

TRIES = 3
OPEN_S = 900.0
MESSAGE_S = 10.0
MOST_CONNECTIONS = 8
_LOCKED = f"a wrong code came {TRIES} times: this pairing is locked"
_LOCKED_FIX = "start `exo-kimi stage --pair` again, which shows another code; who typed the wrong ones?"


@dataclass(frozen=True, slots=True, kw_only=True)
class Introduction:
    """What a machine says of itself once the code was proved."""

    id: str
    name: str

    @classmethod
    def read(cls, message: Mapping[str, Any]) -> Introduction:
        """From the other side's message."""
        return cls(id=str(message.get("id", ""))[:64], name=str(message.get("name", ""))[:64])


class PairingListener:
    """Waits for one machine that has the code, on the loop that runs when this is made.

    Args:
        code: shown to the person.
        key: this machine's cluster key, None where it has none.
        own: what it says of itself.
    """

    def __init__(self, code: PairingCode, key: ClusterKey | None, own: Introduction) -> None:
        self._code, self._key, self._own = code, key, own
        self._wrong = 0
        self._connections = 0
        self._paired: asyncio.Future[tuple[ClusterKey, Introduction]] = asyncio.get_running_loop().create_future()

    async def open(self, address: Address) -> asyncio.Server:
        """Listen.

        Raises:
            AddressError: it is in use, or not this machine's.
        """
        host = "0.0.0.0" if address.host == "*" else address.host
        try:
            return await asyncio.start_server(self._serve, host, address.port, limit=MOST_BYTES)
        except OSError as error:
            raise AddressError("cannot listen", found=error.strerror, where=f"--listen {address}") from error

    async def wait(self, server: asyncio.Server) -> tuple[ClusterKey, Introduction]:
        """The key of the cluster and the other machine, once it was paired; the server listens no more then.

        Raises:
            PairingError: three wrong codes, or nobody came.
        """
        try:
            async with asyncio.timeout(OPEN_S):
                return await self._paired
        except TimeoutError:
            raise PairingError(f"nobody paired within {OPEN_S / 60:.0f} minutes", fix="start it again") from None
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        try:
            if self._connections <= MOST_CONNECTIONS:
                await self._pair(reader, writer)
        except ExoKimiError as error:
            with contextlib.suppress(OSError):
                writer.write(encode({"error": error.what, "fix": error.fix or ""}))
                await writer.drain()
        except (OSError, TimeoutError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # somebody who looked whether anything is there, or went away
        finally:
            self._connections -= 1
            writer.close()

    async def _pair(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        exchange = CodeExchange(self._code, "stage")
        first = decode(await _line(reader))
        self._check_open()
        keys = exchange.finish(first.get("spake"))
        writer.write(encode({"spake": exchange.message}))
        proof = decode(await _line(reader)).get("proof")
        self._check_open()  # others may have tried meanwhile
        if not keys.is_proof(proof):
            raise self._one_wrong()
        own = {"id": self._own.id, "name": self._own.name, "key": self._key.secret.decode() if self._key else None}
        writer.write(encode({"proof": keys.proof(), "sealed": keys.seal("stage", own)}))
        last = keys.unseal("serve", decode(await _line(reader)).get("sealed"))
        if "error" in last:
            raise PairingError(str(last["error"]))
        key = ClusterKey.from_text(str(last.get("key")), where="the pairing")
        self._check_open()
        writer.write(encode({"sealed": keys.seal("done", {"done": True})}))
        await writer.drain()
        self._paired.set_result((key, Introduction.read(last)))

    def _check_open(self) -> None:
        if self._paired.done():
            raise PairingError(_LOCKED if self._wrong >= TRIES else "this machine was paired just now", fix=_LOCKED_FIX)

    def _one_wrong(self) -> PairingError:
        self._wrong += 1
        left = TRIES - self._wrong
        if left > 0:
            return PairingError(
                "the code is another one than the stage shows", fix=f"type it again; {left} more wrong and it is locked"
            )
        error = PairingError(_LOCKED, fix=_LOCKED_FIX)
        if not self._paired.done():
            self._paired.set_exception(error)
        return error


async def _line(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(MESSAGE_S):
        line = await reader.readline()
    if not line:
        raise ConnectionError("the other side went away")
    return line


def machine_name() -> str:
    """What this machine is called, in letters that every name may have."""
    name = socket.gethostname().partition(".")[0]
    return (
        "".join(each if each.isascii() and (each.isalnum() or each in "-_") else "-" for each in name).strip("-_")
        or "mac"
    )
