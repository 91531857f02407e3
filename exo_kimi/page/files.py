"""The page's own files, from the package, with headers that let a browser load nothing from elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

FOLDER = "/page/"
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
# No inline script or style, no eval, no other address, and no page around this one.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # asked for again each time, and sent again only when it changed
    "vary": "accept",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PageFile:
    """One file of the page. `tag` changes with its bytes."""

    data: bytes
    media_type: str
    tag: str

    def response(self, request: Request) -> Response:
        """The file, or 304 for a browser that has it."""
        headers = {**HEADERS, "etag": self.tag}
        if request.headers.get("if-none-match") == self.tag:
            return Response(status_code=304, headers=headers)
        return Response(self.data, headers={**headers, "content-type": self.media_type})


def page_files() -> dict[str, PageFile]:
    """Every file of the page by its address below `/page/`."""
    return {path: _read(entry) for path, entry in _walk(resources.files("exo_kimi.page").joinpath("static"), "")}


def page_routes(files: dict[str, PageFile]) -> list[Route]:
    """A route for each file. The page itself is at `/`, which `wants_page` tells apart."""

    def route(path: str, file: PageFile) -> Route:
        async def endpoint(request: Request) -> Response:
            return file.response(request)

        return Route(FOLDER + path, endpoint, methods=["GET"], include_in_schema=False)

    return [route(path, file) for path, file in files.items() if path != "index.html"]


def root_response(request: Request, page: PageFile | None) -> Response:
    """What is at `/`: the page for a browser, else a line that says the server is there."""
    if page is not None and wants_page(request):
        return page.response(request)
    return PlainTextResponse("exo-kimi is running", headers={"vary": "accept"})


def wants_page(request: Request) -> bool:
    """Whether a browser asks for something to look at; curl, and clients that only see whether a server is there, do not."""
    return "text/html" in request.headers.get("accept", "")


def _walk(folder: Traversable, prefix: str) -> Iterator[tuple[str, Traversable]]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _walk(entry, f"{prefix}{entry.name}/")
        elif entry.name.rpartition(".")[2] in TYPES:
            yield prefix + entry.name, entry


def _read(entry: Traversable) -> PageFile:
    data = entry.read_bytes()
    tag = f'"{hashlib.sha256(data).hexdigest()[:24]}"'
    return PageFile(data=data, media_type=TYPES[entry.name.rpartition(".")[2]], tag=tag)
