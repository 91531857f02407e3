"""`GET /exo-kimi` in exo's API: which engine a node's Kimis run on, in which version, and how its runners are.

exo's state has no room for it. A node without the route, which exo answers with 404, runs every model on exo's own engine.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import httpx

from exo_kimi.plugin.runner.beats import RunnerReport, RunnerWatch
from exo_kimi.runtime.protocol.versions import Versions

ROUTE = "/exo-kimi"
API_PORT = "EXO_KIMI_API_PORT"  # runners inherit it; exo, too, presumes that every node has the same
ASK_S = 3.0
Engine = Literal["exo-kimi", "exo", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeEngine:
    """What a node says of its engine.

    Args:
        engine: `exo-kimi`, `exo` when it does not know us, `unknown` when it did not answer.
        node_id: exo's; empty when unknown.
        versions: of what must agree between nodes; None unless the engine is ours.
        runners: by exo's instance and rank.
    """

    engine: Engine
    node_id: str = ""
    versions: Versions | None = None
    runners: Mapping[tuple[str, int], RunnerReport] = field(default_factory=dict)


def ask_engine(http: httpx.Client, url: str = "") -> NodeEngine:
    """Ask one node.

    Args:
        http: the client.
        url: of the node's API; empty for the one that the client is for.
    """
    try:
        reply = http.get(f"{url}{ROUTE}", timeout=ASK_S)
        if reply.status_code == 404:
            own_id = http.get(f"{url}/node_id", timeout=ASK_S)
            return (
                NodeEngine(engine="exo", node_id=str(own_id.json()))
                if own_id.is_success
                else NodeEngine(engine="unknown")
            )
        return _read(reply.json()) if reply.is_success else NodeEngine(engine="unknown")
    except (httpx.HTTPError, httpx.InvalidURL, KeyError, TypeError, ValueError):
        return NodeEngine(engine="unknown")


def with_engine_route(watch: RunnerWatch) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """exo's `API._setup_routes`, with our route.

    Args:
        watch: knows the node's runners.
    """

    def wrap(setup: Callable[[Any], None]) -> Callable[[Any], None]:
        @functools.wraps(setup)
        def _setup_routes(self: Any) -> None:
            setup(self)
            os.environ[API_PORT] = str(self.port)

            def tell() -> dict[str, Any]:
                return _told(str(self.node_id), watch)

            self.app.get(ROUTE)(tell)

        return _setup_routes

    return wrap


def _told(node_id: str, watch: RunnerWatch) -> dict[str, Any]:
    return {
        "node_id": node_id,
        "versions": asdict(Versions.installed()),
        "runners": [asdict(report) for report in watch.reports()],
    }


def _read(body: Any) -> NodeEngine:
    reports = [RunnerReport(**each) for each in body["runners"]]
    return NodeEngine(
        engine="exo-kimi",
        node_id=str(body["node_id"]),
        versions=Versions(**body["versions"]),
        runners={(each.instance_id, each.rank): each for each in reports},
    )
