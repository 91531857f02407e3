"""Pictures from the web, for servers that were told to fetch them: never from an address that the web cannot reach.

The name is resolved once and the connection goes to the address that was looked at, so that a name which changes its address in
between reaches nothing private.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from urllib.parse import urljoin, urlsplit

import httpx

from exo_kimi.errors import RequestError
from exo_kimi.pictures.reader import MOST_BYTES, PictureUrl
from exo_kimi.units import format_bytes

TIMEOUT_S = 10.0
"""For all of one picture."""
MOST_REDIRECTS = 3
_turns = threading.BoundedSemaphore(4)  # the threads that prepare requests are not all to wait for slow sites
_TRANSLATED = tuple(map(ipaddress.IPv6Network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")))
"""IPv6 addresses that stand for one of IPv4: NAT64, 6to4, Teredo."""


def fetch_picture(url: PictureUrl) -> bytes:
    """The bytes behind an http(s) URL. Slow: call it in a thread.

    Raises:
        RequestError: it is not to be had, too large, too slow, or at an address that is not public.
    """
    if not _turns.acquire(timeout=TIMEOUT_S):
        raise _failed(url, "too many pictures are being fetched")
    deadline = time.monotonic() + TIMEOUT_S
    target = url.url
    try:
        with httpx.Client(timeout=TIMEOUT_S, follow_redirects=False, trust_env=False) as client:
            for _ in range(MOST_REDIRECTS + 1):
                found = _get(client, target, url, deadline)
                if isinstance(found, bytes):
                    return found
                target = urljoin(target, found)
    except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError, ValueError) as error:
        raise _failed(url, f"{type(error).__name__}: {error}"[:160]) from None
    finally:
        _turns.release()
    raise _failed(url, f"more than {MOST_REDIRECTS} redirects")


def _get(client: httpx.Client, target: str, url: PictureUrl, deadline: float) -> bytes | str:
    """The body, or where the answer redirects to."""
    parts = urlsplit(target)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise _failed(url, f"a redirect to {target[:80]!r}" if target != url.url else "no such address")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    address = public_address(parts.hostname, port, url)
    literal = f"[{address}]" if ":" in address else address
    netloc = parts.hostname if parts.port is None else f"{parts.hostname}:{parts.port}"
    request = client.build_request(
        "GET",
        parts._replace(netloc=f"{literal}:{port}", fragment="").geturl(),
        headers={"host": netloc, "accept": "image/*"},
        extensions={"sni_hostname": parts.hostname},
    )
    answer = client.send(request, stream=True)
    try:
        if answer.is_redirect:
            return str(answer.headers.get("location", ""))
        if not answer.is_success:
            raise _failed(url, f"status {answer.status_code}")
        body = bytearray()
        for piece in answer.iter_bytes(65_536):
            body += piece
            if len(body) > MOST_BYTES:
                raise _failed(url, f"more than {format_bytes(MOST_BYTES)}")
            if time.monotonic() > deadline:
                raise _failed(url, f"not there after {TIMEOUT_S:g} s")
        return bytes(body)
    finally:
        answer.close()


def public_address(host: str, port: int, url: PictureUrl) -> str:
    """An address of a host, every one of which is public.

    Raises:
        RequestError: one is not, or the name has none.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise _failed(url, f"the name {host[:80]!r} has no address") from None
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses:
        if not _is_public(address):
            raise _failed(url, f"{host[:80]} is not at a public address")
    return addresses[0]


def _is_public(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    hidden = isinstance(parsed, ipaddress.IPv6Address) and (
        parsed.ipv4_mapped is not None or any(parsed in network for network in _TRANSLATED)
    )
    return parsed.is_global and not parsed.is_multicast and not hidden


def _failed(url: PictureUrl, found: str) -> RequestError:
    return RequestError(
        f"'{url.param}' cannot be fetched",
        expected=f"a public http(s) address, an answer in {TIMEOUT_S:g} s",
        found=found,
        fix="send the picture itself, as a data: URL",
        param=url.param,
        code="image_not_fetched",
    )
