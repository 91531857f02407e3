"""URLs in a request to pictures: what is read, kept, bounded and refused, and what is never fetched."""

from __future__ import annotations

import base64
import io
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from exo_kimi.errors import RequestError, UnsupportedError
from exo_kimi.pictures import decoding, fetching, reader
from exo_kimi.pictures.fetching import fetch_picture
from exo_kimi.pictures.picture import PixelRules
from exo_kimi.pictures.reader import PictureReader, PictureUrl, data_of

RULES = PixelRules(patch_size=14, merge_kernel_size=(2, 2))


def png(color: str = "red", size: tuple[int, int] = (28, 28)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def data_url(data: bytes) -> PictureUrl:
    return PictureUrl("data:image/png;base64," + base64.b64encode(data).decode(), "image")


def test_pictures_come_in_the_order_of_their_urls() -> None:
    red, blue = PictureReader(RULES).read([data_url(png("red")), data_url(png("blue"))])
    assert red.pixels[:3] == b"\xff\0\0"
    assert blue.pixels[:3] == b"\0\0\xff"


def test_a_picture_that_comes_again_is_not_decoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = PictureReader(RULES)
    first = pictures.read([data_url(png())])
    monkeypatch.setattr(reader, "decode_picture", lambda *_, **__: pytest.fail("it was decoded again"))
    assert pictures.read([data_url(png())])[0] is first[0]


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "KEPT_BYTES", 3 * 28 * 28 * 3)
    pictures = PictureReader(RULES)
    for color in ("red", "blue", "lime", "black", "white"):
        pictures.read([data_url(png(color))])
    assert len(pictures._kept) == 3
    assert pictures._kept_bytes == 3 * 28 * 28 * 3


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("data:image/png;base64", "no data: URL"),
        ("data:image/png;base64,###", "no data: URL"),
        ("data:image/png;base64,QUJD", "no picture of a known format"),
        ("data:,", "no picture of a known format"),
        ("file:///etc/passwd", "no picture's URL"),
        ("ftp://example.com/a.png", "no picture's URL"),
        ("gopher://127.0.0.1:70/_", "no picture's URL"),
        ("", "no picture's URL"),
        ("/etc/passwd", "no picture's URL"),
        ("https://example.com/a.png", "fetches nothing"),
        ("HTTP://127.0.0.1/", "fetches nothing"),
    ],
)
def test_other_urls_are_refused_by_name(url: str, why: str) -> None:
    with pytest.raises(RequestError, match=why) as refused:
        PictureReader(RULES).read([PictureUrl(url, "messages[3].content[1]")])
    assert refused.value.param == "messages[3].content[1]"


def test_percent_encoded_and_broken_up_data_is_read() -> None:
    plain = png()
    encoded = "data:image/png," + "".join(f"%{byte:02X}" for byte in plain)
    lines = base64.encodebytes(plain).decode()
    assert data_of(PictureUrl(encoded, "image")) == plain
    assert data_of(PictureUrl("data:;BASE64," + lines, "image")) == plain


def test_too_long_too_many_and_too_large_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = PictureReader(RULES)
    with pytest.raises(RequestError, match="too many pictures"):
        pictures.read([data_url(png())] * (reader.MOST_PICTURES + 1))
    with pytest.raises(RequestError, match="too large a file"):
        pictures.read([PictureUrl("data:;base64," + "A" * (3 * reader.MOST_BYTES + 4), "image")])
    monkeypatch.setattr(reader, "MOST_REQUEST_BYTES", 3 * 28 * 28 * 3)
    with pytest.raises(RequestError, match="too large together"):
        pictures.read([data_url(png())] * 4)


class Site(BaseHTTPRequestHandler):
    """A loopback site: a picture, redirects, and bodies that do not end."""

    def do_GET(self) -> None:
        if self.path == "/picture":
            self._answer(200, png())
        elif self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"x" * 65536)
            except OSError:
                pass
        else:
            self._answer(404, b"no")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Be silent."""


@pytest.fixture
def site() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take loopback for a public address, as nothing else can be reached here."""
    monkeypatch.setattr(fetching, "_is_public", lambda address: True)


def test_a_public_picture_is_fetched(site: str, trusting: None) -> None:
    assert fetch_picture(PictureUrl(f"{site}/picture", "image")) == png()
    assert fetch_picture(PictureUrl(f"{site}/to//picture", "image")) == png()
    pictures = PictureReader(RULES, fetch=fetch_picture)
    assert pictures.read([PictureUrl(f"{site}/picture", "image")])[0].pixels[:3] == b"\xff\0\0"


@pytest.mark.parametrize(
    ("path", "why"),
    [("/gone", "status 404"), ("/to/ftp://example.com/", "a redirect to"), ("/endless", "more than 20")],
)
def test_what_cannot_be_fetched_says_why(site: str, trusting: None, path: str, why: str) -> None:
    with pytest.raises(RequestError, match="cannot be fetched") as refused:
        fetch_picture(PictureUrl(site + path, "image"))
    assert why in str(refused.value)


def test_redirects_end(site: str, trusting: None) -> None:
    loop = f"{site}/to//to//to//to//to//picture"
    with pytest.raises(RequestError, match="cannot be fetched"):
        fetch_picture(PictureUrl(loop, "image"))


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "0.0.0.0", "10.1.2.3", "192.168.1.1", "172.16.0.9", "169.254.169.254", "100.64.0.1",
        "[::1]", "[fe80::1]", "[fd00::1]", "[::ffff:127.0.0.1]", "[::ffff:10.0.0.1]", "[2002:7f00:0001::]", "224.0.0.1",
        "0x7f000001", "2130706433", "127.1", "[64:ff9b::7f00:1]",
    ],
)  # fmt: skip
def test_nothing_private_is_reached(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it connected"))
    with pytest.raises(RequestError, match="cannot be fetched"):
        fetch_picture(PictureUrl(f"http://{host}/picture", "image"))


def test_a_name_that_turns_private_after_it_was_looked_at_is_not_followed(
    site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS rebinding: the second answer of a name server is never asked for."""
    port = int(site.rpartition(":")[2])
    asked: list[str] = []

    def resolve(host: str, *rest: object, **more: object) -> list[tuple[object, ...]]:
        asked.append(host)
        address = host if host != "pictures.test" else "127.0.0.1" if len(asked) == 1 else "10.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(fetching.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(fetching, "_is_public", lambda address: address == "127.0.0.1")
    assert fetch_picture(PictureUrl(f"http://pictures.test:{port}/picture", "image")) == png()
    assert asked.count("pictures.test") == 1


def test_credentials_in_a_url_are_not_sent() -> None:
    with pytest.raises(RequestError, match="cannot be fetched"):
        fetch_picture(PictureUrl("http://user:secret@example.com/", "image"))


def test_the_formats_that_are_read_are_named() -> None:
    with pytest.raises(UnsupportedError, match=", ".join(decoding.FORMATS)):
        PictureReader(RULES).read([data_url(b"no picture")])
