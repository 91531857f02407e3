"""The page's routes: what it is told of its server, the stream of states, and the planner behind it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse

import exo_kimi
from exo_kimi.checkpoint.vision import NoVision
from exo_kimi.page.cluster_state import ClusterPicture, engine_state
from exo_kimi.page.events import cluster_events
from exo_kimi.page.planning import PlanAnswer, PlanChoices, PlanRequest, make_plan, parse_plan, plan_choices
from exo_kimi.planner.plan import Plan
from exo_kimi.serve.body import BodyReader
from exo_kimi.serve.contract import json_body, refusals
from exo_kimi.serve.health import health_report
from exo_kimi.serve.service import Service
from exo_kimi.serve.workers import Workers


class RecommendedSampling(BaseModel):
    """What the checkpoint recommends, and what a request gets that says nothing."""

    temperature: float
    top_p: float


class AboutPage(BaseModel):
    """What the page shows, and of what.

    Args:
        views: of `chat`, `cluster` and `planner`, those that this server has.
        model: null where no model is served.
        context: in tokens, 0 while it is not known.
        pictures: whether requests may have some.
    """

    views: list[str]
    model: str | None
    version: str
    context: int = 0
    pictures: bool = False
    sampling: RecommendedSampling | None = None


MODELS = (PlanRequest, ClusterPicture)


def add_routes(
    app: FastAPI, service: Service, refused: tuple[int, ...], key: dict[str, Any], *, plan: Plan | None
) -> None:
    """What the page asks a server of ours."""
    door = _PageDoor(service=service, plan=plan)
    add_about_route(app, door.about, refused, key)
    add_events_route(app, door.look, refused, key)
    add_planner_routes(app, service.workers, refused, key)


def add_about_route(
    app: FastAPI, about: Callable[[], Awaitable[AboutPage]], refused: tuple[int, ...], key: dict[str, Any]
) -> None:
    """`GET /v1/page`."""

    async def page() -> AboutPage:
        """What the page shows, and of what."""
        return await about()

    app.get("/v1/page", response_model=AboutPage, responses=refusals(*refused), **key)(page)


def add_events_route(
    app: FastAPI, look: Callable[[], Awaitable[ClusterPicture]], refused: tuple[int, ...], key: dict[str, Any]
) -> None:
    """`GET /v1/cluster/events`."""
    stream: dict[int | str, dict[str, Any]] = {
        200: {
            "description": "`event: state` with a whole ClusterPicture, at most four times a second, until the reader leaves.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        }
    }

    async def events() -> StreamingResponse:
        """Every state of the cluster, as it changes."""
        return cluster_events(look)

    app.get("/v1/cluster/events", responses={**stream, **refusals(*refused)}, **key)(events)


def add_planner_routes(app: FastAPI, workers: Workers, refused: tuple[int, ...], key: dict[str, Any]) -> None:
    """`GET /v1/plan/choices` and `POST /v1/plan`. The app has a BodyReader at `state.bodies`."""
    example = {"cluster": "m3-ultra-512, m2-ultra-192", "model": "kimi-k2-thinking", "context": 40_960}

    async def choices() -> PlanChoices:
        """Machines, models and recipes that the planner knows by name."""
        return plan_choices()

    async def plan(request: Request, asked: Annotated[PlanRequest, Depends(read_plan_request)]) -> JSONResponse:
        """The best split of a published model over machines by name; 400 with the planner's words where nothing fits."""
        answer = await workers.run(request, lambda: make_plan(asked))
        return JSONResponse(answer.model_dump())

    app.get("/v1/plan/choices", response_model=PlanChoices, responses=refusals(*refused), **key)(choices)
    told: Any = {
        "response_model": PlanAnswer,
        "responses": refusals(400, 408, 413, 415, *refused),
        "openapi_extra": json_body(PlanRequest, example),
    }
    app.post("/v1/plan", **told, **key)(plan)


async def read_plan_request(request: Request) -> PlanRequest:
    """The body of a request for a plan."""
    bodies: BodyReader = request.app.state.bodies
    return await bodies.read(request, parse_plan)


@dataclass(frozen=True, slots=True, kw_only=True)
class _PageDoor:
    service: Service
    plan: Plan | None

    async def about(self) -> AboutPage:
        speaker = self.service.speaker
        return AboutPage(
            views=["chat", "cluster", "planner"],
            model=self.service.names.first,
            version=exo_kimi.__version__,
            context=self.service.engine.snapshot().context,
            pictures=not isinstance(speaker.pictures, NoVision),
            sampling=RecommendedSampling(**asdict(speaker.defaults.sampling())),
        )

    async def look(self) -> ClusterPicture:
        snapshot, model, version = self.service.engine.snapshot(), self.service.names.first, exo_kimi.__version__
        status, report = health_report(snapshot, model=model, version=version)
        reason = None if status == 200 else str(report["reason"])
        return engine_state(snapshot, model=model, version=version, reason=reason, plan=self.plan)
