"""`exo-kimi ui`: the page without a model. The planner, and the cluster of a running exo.

Its port is one above a server's, so that both run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

import uvicorn
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

import exo_kimi
from exo_kimi.client.exo_picture import exo_picture
from exo_kimi.errors import ExoKimiError, RequestError
from exo_kimi.page.cluster_state import ClusterPicture
from exo_kimi.page.files import page_files, page_routes, root_response
from exo_kimi.plugin.control.http import ExoClient
from exo_kimi.serve.body import BodyReader, TextBound
from exo_kimi.serve.gate import Gate, allowed_hosts
from exo_kimi.serve.page import AboutPage, add_about_route, add_events_route, add_planner_routes
from exo_kimi.serve.problems import ApiProblem, answer_error, answer_http_error
from exo_kimi.serve.server import base_url, bind
from exo_kimi.serve.workers import Workers


def run_ui(*, host: str, port: int, exo: str | None, announce: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C.

    Args:
        host: interface to listen on.
        port: 0 takes a free one.
        exo: address of any node of an exo cluster to show; None shows the planner alone.
        announce: told the page's address.

    Raises:
        AddressError: the address cannot be bound.
        ExoKimiError: exo does not answer, or is not known.
    """
    client = None if exo is None else ExoClient(exo)
    if client is not None:
        client.state()
    listener = bind(host, port)
    announce(base_url(*listener.getsockname()[:2]))
    app = create_ui_app(client, hosts=allowed_hosts(host))
    config = uvicorn.Config(app, lifespan="off", log_config=None, access_log=False, server_header=False, ws="none")
    try:
        asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))
    except KeyboardInterrupt:
        pass
    finally:
        listener.close()


def create_ui_app(client: ExoClient | None, *, hosts: frozenset[str] | None = None) -> FastAPI:
    """The page's app.

    Args:
        client: of the exo to show; None shows the planner alone.
        hosts: names that it answers to.
    """
    app = FastAPI(title="exo-kimi ui", version=exo_kimi.__version__, docs_url=None, redoc_url=None, openapi_url=None)
    workers = Workers()
    app.state.bodies = BodyReader(workers, lambda: TextBound(context=4096, token_bytes=16))
    files = page_files()

    async def root(request: Request) -> Response:
        return root_response(request, files["index.html"])

    async def about() -> AboutPage:
        views = ["planner"] if client is None else ["cluster", "planner"]
        return AboutPage(views=views, model=None, version=exo_kimi.__version__)

    app.get("/", include_in_schema=False)(root)
    app.router.routes.extend(page_routes(files))
    add_about_route(app, about, (), {})
    add_planner_routes(app, workers, (), {})
    if client is not None:
        add_events_route(app, partial(_look, client), (), {})
    for kind in (ExoKimiError, RequestError, ApiProblem, Exception):
        app.add_exception_handler(kind, answer_error)
    app.add_exception_handler(HTTPException, answer_http_error)
    app.add_middleware(Gate, metrics=_NotCounted(), paths=frozenset(), hosts=hosts)
    return app


async def _look(client: ExoClient) -> ClusterPicture:
    """One look at exo; where it does not answer, its words as the reason."""
    try:
        return exo_picture(await asyncio.to_thread(client.state))
    except ExoKimiError as error:
        return ClusterPicture(
            kind="exo",
            time_s=0.0,
            ready=False,
            reason=str(error),
            model=None,
            version=None,
            context=0,
            stages=[],
            requests=[],
            totals=None,
            prediction=None,
            events=[],
        )


class _NotCounted:
    """Nobody scrapes this server."""

    def answered(self, path: str, status: int) -> None:
        """Not counted."""
