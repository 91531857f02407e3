"""From the URLs in a request to pictures: `data:` always, http(s) where the owner of the server allows it."""

from __future__ import annotations

import base64
import binascii
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from threading import Lock
from urllib.parse import unquote_to_bytes

from exo_kimi.errors import RequestError, UnsupportedError
from exo_kimi.pictures.decoding import decode_picture
from exo_kimi.pictures.picture import Picture, PixelRules
from exo_kimi.units import format_bytes

MOST_PICTURES = 64
"""Of one request."""
MOST_BYTES = 20 * 1024**2
"""Of one file, as OpenAI's API has it."""
MOST_REQUEST_BYTES = 64 * 1024**2
"""Of all pictures of one request, decoded to what the tower takes."""
FETCHING_S = 30.0
"""For all pictures of one request that are fetched."""
KEPT_BYTES = 64 * 1024**2
"""Of pictures that were decoded lately: an agent sends its whole conversation with every turn."""


@dataclass(frozen=True, slots=True)
class PictureUrl:
    """Where a picture is, and what it is called in errors."""

    url: str
    param: str


class PictureReader:
    """Reads the pictures of requests, from any thread.

    Args:
        rules: of the checkpoint.
        fetch: gets the bytes of an http(s) URL (and its name for errors); None refuses such URLs.
    """

    def __init__(self, rules: PixelRules, *, fetch: Callable[[PictureUrl], bytes] | None = None) -> None:
        self.rules = rules
        self._fetch = fetch
        self._kept: OrderedDict[bytes, Picture] = OrderedDict()
        self._kept_bytes = 0
        self._lock = Lock()

    def read(self, urls: Sequence[PictureUrl]) -> list[Picture]:
        """The pictures of one request, in order. Slow: call it in a thread.

        Raises:
            UnsupportedError: a format or a kind of URL that is not read.
            RequestError: too many pictures, too large ones, or damaged ones.
        """
        if len(urls) > MOST_PICTURES:
            raise RequestError(
                "too many pictures in one request",
                expected=f"at most {MOST_PICTURES}",
                found=len(urls),
                param=urls[MOST_PICTURES].param,
                code="too_many_images",
            )
        pictures: list[Picture] = []
        total = 0
        deadline = time.monotonic() + FETCHING_S
        for url in urls:
            if time.monotonic() > deadline and not url.url[:5].lower() == "data:":
                raise RequestError(
                    f"fetching the pictures up to '{url.param}' took too long",
                    expected=f"at most {FETCHING_S:g} s for all",
                    fix="send the pictures themselves, as data: URLs",
                    param=url.param,
                    code="image_not_fetched",
                )
            picture = self._picture(self._data(url), url.param)
            total += len(picture.pixels)
            if total > MOST_REQUEST_BYTES:
                raise RequestError(
                    "the pictures of one request are too large together",
                    expected=f"at most {format_bytes(MOST_REQUEST_BYTES)} of pixels",
                    found=f"{format_bytes(total)} in the first {len(pictures) + 1}",
                    param=url.param,
                    code="image_too_large",
                )
            pictures.append(picture)
        return pictures

    def _data(self, url: PictureUrl) -> bytes:
        scheme = url.url[:8].lower()
        if scheme.startswith("data:"):
            return data_of(url)
        if not scheme.startswith(("http://", "https://")):
            raise UnsupportedError(
                f"'{url.param}' is no picture's URL",
                expected="a data: URL" + (" or http(s)" if self._fetch is not None else ""),
                found=repr(url.url[:40]),
                param=url.param,
                code="unsupported_image_url",
            )
        if self._fetch is None:
            raise UnsupportedError(
                f"'{url.param}' is on the web, and this server fetches nothing",
                expected="a data: URL",
                found=repr(url.url[:80]),
                fix="send the picture itself, or start the server with --fetch-images",
                param=url.param,
                code="unsupported_image_url",
            )
        return self._fetch(url)

    def _picture(self, data: bytes, param: str) -> Picture:
        key = sha256(data).digest()
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                return found
        picture = decode_picture(data, self.rules, param=param)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = picture
                self._kept_bytes += len(picture.pixels)
            while self._kept_bytes > KEPT_BYTES and len(self._kept) > 1:
                _, old = self._kept.popitem(last=False)
                self._kept_bytes -= len(old.pixels)
        return picture


def data_of(url: PictureUrl) -> bytes:
    """The bytes of a `data:` URL.

    Raises:
        RequestError: it is malformed or too long.
    """
    head, comma, body = url.url.partition(",")
    if not comma:
        raise _malformed(url, "no comma in it")
    # Base64 takes four characters for three bytes, percent-encoding three for one at most.
    if len(body) > 3 * MOST_BYTES:
        raise _too_long(url, len(body))
    if not head.lower().endswith(";base64"):
        data = unquote_to_bytes(body)
    else:
        try:
            data = base64.b64decode("".join(body.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise _malformed(url, str(error)) from None
    if len(data) > MOST_BYTES:
        raise _too_long(url, len(data))
    return data


def _malformed(url: PictureUrl, found: str) -> RequestError:
    return RequestError(
        f"'{url.param}' is no data: URL",
        expected="data:image/png;base64,...",
        found=found[:120],
        param=url.param,
        code="invalid_image",
    )


def _too_long(url: PictureUrl, length: int) -> RequestError:
    return RequestError(
        f"'{url.param}' is too large a file",
        expected=f"at most {format_bytes(MOST_BYTES)}",
        found=format_bytes(length),
        param=url.param,
        code="image_too_large",
    )
