"""A rank asks the nodes that it sees which engine they have, by the route that our nodes add to exo's API."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from exo_kimi.errors import ExoPlacementError
from exo_kimi.plugin.api.engine_route import API_PORT, ROUTE, ask_engine, with_engine_route
from exo_kimi.plugin.runner.assignment import node_layers_of
from exo_kimi.plugin.runner.beats import RunnerBeat, RunnerReport, RunnerWatch
from exo_kimi.plugin.runner.neighbours import check_neighbours
from exo_kimi.runtime.protocol.versions import Versions


class Api:
    """exo's API of a node, with our route where the node runs our engine."""

    def __init__(self, node_id: str, watch: RunnerWatch | None) -> None:
        self.node_id, self.port = node_id, 52415
        self.routes: dict[str, Callable[[], Any]] = {}
        self.app = SimpleNamespace(get=lambda path: lambda route: self.routes.setdefault(path, route))
        if watch is None:
            self._setup_routes()
        else:
            with_engine_route(watch)(Api._setup_routes)(self)

    def _setup_routes(self) -> None:
        self.app.get("/node_id")(lambda: self.node_id)

    def handle(self, request: httpx.Request) -> httpx.Response:
        route = self.routes.get(request.url.path)
        return httpx.Response(404) if route is None else httpx.Response(200, json=route())


@contextmanager
def served(api: Api, address: str, port: int = 0) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            reply = api.handle(httpx.Request("GET", f"http://exo{self.path}"))
            self.send_response(reply.status_code)
            self.send_header("content-length", str(len(reply.content)))
            self.end_headers()
            self.wfile.write(reply.content)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer((address, port), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_PORT, "1")  # so that it is as before when the test is over


def ask(api: Api) -> Any:
    with httpx.Client(transport=httpx.MockTransport(api.handle), base_url="http://exo") as http:
        return ask_engine(http)


def test_our_route_tells_node_versions_and_runners(tmp_path: Path) -> None:
    report = RunnerReport(pid=7, instance_id="i", model_id="m", rank=1, engine="exo", why="not a Kimi K2")
    RunnerBeat(report, tmp_path)
    found = ask(Api("node1", RunnerWatch(tmp_path, children=lambda: frozenset({7}))))
    assert (found.engine, found.node_id, found.versions) == ("exo-kimi", "node1", Versions.installed())
    assert dict(found.runners) == {("i", 1): report}
    assert os.environ[API_PORT] == "52415"


def test_a_bare_exo_is_known_by_its_answer_and_anything_else_is_unknown() -> None:
    bare = Api("node1", None)
    found = ask(bare)
    assert (found.engine, found.node_id, found.versions) == ("exo", "node1", None)
    bare.routes.clear()
    assert ask(bare).engine == "unknown"
    bare.routes[ROUTE] = lambda: {"hello": 1}
    assert ask(bare).engine == "unknown"


@contextmanager
def pair(exo_instance: Any, other: Api) -> Iterator[tuple[Any, str]]:
    """Rank 0 of two, and the port at which the other node answers."""
    with ExitStack() as exits:
        port = exits.enter_context(served(other, "127.0.0.2"))
        yield node_layers_of(exo_instance((5, 2), 0)), str(port)


def test_a_neighbour_without_our_engine_is_named_at_once(exo_instance: Any) -> None:
    with pair(exo_instance, Api("node1", None)) as (own, port):
        began = time.monotonic()
        with pytest.raises(ExoPlacementError, match="node1 does not run exo-kimi's engine"):
            check_neighbours(own, api_port=port)
        assert time.monotonic() - began < 5


def test_a_neighbour_with_another_version_is_named(exo_instance: Any) -> None:
    api = Api("node1", RunnerWatch())
    versions = {"exo_kimi": "9.9", "mlx": "1", "mlx_lm": "1"}
    api.routes[ROUTE] = lambda: {"node_id": "node1", "versions": versions, "runners": []}
    with pair(exo_instance, api) as (own, port), pytest.raises(ExoPlacementError, match="different versions") as found:
        check_neighbours(own, api_port=port)
    assert "9.9" in str(found.value) and "node1" in str(found.value) and "node0" in str(found.value)


def test_a_neighbour_with_our_engine_is_well_and_so_is_one_that_cannot_be_asked(exo_instance: Any) -> None:
    with pair(exo_instance, Api("node1", RunnerWatch())) as (own, port):
        check_neighbours(own, api_port=port)
    check_neighbours(own, api_port=port)  # nobody listens there any more
    check_neighbours(own, api_port=None)


def test_another_node_at_the_address_is_not_the_one_that_is_meant(exo_instance: Any) -> None:
    with pair(exo_instance, Api("a stranger", None)) as (own, port):
        check_neighbours(own, api_port=port)
