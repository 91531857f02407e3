"""Addresses of stages: parsed strictly, printed one way, and judged loopback or not."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from exo_kimi.errors import AddressError

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?|\*")
_MAX_IPC_BYTES = 100  # sun_path is 104 bytes on macOS, 108 on Linux
AddressInfo = tuple[Any, Any, int, str, tuple[Any, ...]]
EXAMPLE = "HOST:PORT or tcp://HOST:PORT, such as 192.168.1.20:52500 or [fd00::20]:52500"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a stage listens: a TCP host and port, or a socket file (`path`, for children of this process only)."""

    host: str
    port: int
    path: str | None = None

    @property
    def endpoint(self) -> str:
        """As ZeroMQ wants it."""
        if self.path is not None:
            return f"ipc://{self.path}"
        return f"tcp://{self}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it; anything else is encrypted. A name other than localhost never is."""
        if self.path is not None or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def is_wildcard(self) -> bool:
        """Whether it means every interface of this machine, so it can be listened on but not connected to."""
        return self.path is None and self.host in ("*", "0.0.0.0", "::")

    def __str__(self) -> str:
        if self.path is not None:
            return self.endpoint
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str, *, option: str, listen: bool = False) -> Address:
    """Read an address that a user gave.

    Args:
        text: `HOST:PORT`, `tcp://HOST:PORT` or `ipc://PATH`; an IPv6 host in brackets.
        option: where it was given, for errors.
        listen: allow port 0 (any free one) and wildcards.

    Raises:
        AddressError: anything else.
    """
    if text.startswith("ipc://"):
        path = text.removeprefix("ipc://")
        if not path.startswith("/") or len(path.encode("utf-8", "surrogateescape")) > _MAX_IPC_BYTES or "\0" in path:
            raise _bad(text, option, f"ipc:// and an absolute path of at most {_MAX_IPC_BYTES} bytes")
        return Address("", 0, path)
    host, colon, digits = text.removeprefix("tcp://").rpartition(":")
    if not colon or not host:
        raise _bad(text, option, EXAMPLE)
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 5 and int(digits) <= 65535):
        raise _bad(text, option, "a port from 1 to 65535 after the last colon")
    if int(digits) == 0 and not listen:
        raise _bad(text, option, "a port from 1 to 65535; port 0 only means something when listening")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        try:
            number = ipaddress.IPv6Address(host)
        except ValueError:
            raise _bad(text, option, "an IPv6 address in the brackets") from None
        if number.is_link_local and number.scope_id is None:
            raise _bad(text, option, f"the interface of a link-local address, as in [{host}%en5]:{digits}")
    elif not _HOST.fullmatch(host):
        raise _bad(text, option, EXAMPLE)
    address = Address(host, int(digits))
    if address.is_wildcard and not listen:
        raise _bad(text, option, "one machine's name or address, not a wildcard")
    return address


def numeric_host(found: Sequence[AddressInfo]) -> str:
    """The first IPv4 address of what `getaddrinfo` found, else the first IPv6 one, as libzmq takes it: with the number of its
    interface where it has one (`fe80::1%2`), without which a link-local address leads nowhere."""
    sockaddr = min(found, key=lambda info: info[0] != socket.AF_INET)[4]
    scope = sockaddr[3] if len(sockaddr) == 4 else 0
    host = str(sockaddr[0]).partition("%")[0]
    return f"{host}%{scope}" if scope else host


def _bad(text: str, option: str, expected: str) -> AddressError:
    return AddressError("cannot read an address", expected=expected, found=repr(text), where=option)
