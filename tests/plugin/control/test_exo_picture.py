"""An exo cluster in the page: what exo's state tells, and nothing that it does not."""

from __future__ import annotations

from typing import Any

import httpx

from exo_kimi.client.exo_picture import exo_picture
from exo_kimi.client.ui import create_ui_app
from exo_kimi.page.cluster_state import ClusterPicture
from exo_kimi.plugin.control.apply import apply_plan
from exo_kimi.plugin.control.http import ExoClient


def test_nodes_are_seen_to_load_their_layers_and_to_be_ready(
    make_exo: Any, client_of: Any, plan_of: Any, clock: Any
) -> None:
    exo = make_exo()
    client = client_of(exo)
    bare = exo_picture(client.state())
    assert [(view.name, view.end_layer) for view in bare.stages] == [("studio", None), ("mini", None)]
    assert not bare.ready and bare.reason == "no model is placed"
    assert bare.stages[0].memory_bytes == 512 << 30 and bare.stages[0].weights_bytes == 32 << 30
    apply_plan(client, plan_of(exo), timing=clock.timing, wait=False)
    seen = [exo_picture(client.state()) for _ in range(12)]
    ranges = [(view.name, view.start_layer, view.end_layer) for view in seen[-1].stages]
    assert ranges == [("0 · mini", 0, 2), ("1 · studio", 2, 7)]
    assert seen[-1].ready and {view.state for view in seen[-1].stages} == {"ready"}
    states = [picture.stages[0].state for picture in seen if len(picture.stages) == 2 and picture.model]
    assert states.index("starting") < states.index("loading") < states.index("ready")
    assert any("on mini: Loading" in str(picture.reason) for picture in seen)


async def test_the_page_says_that_exo_is_gone() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    app = create_ui_app(ExoClient("http://studio:52415", transport=httpx.MockTransport(refuse)))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        assert (await client.get("/v1/page")).json()["views"] == ["cluster", "planner"]
    endpoint: Any = next(route for route in app.routes if getattr(route, "path", "") == "/v1/cluster/events")
    async for text in (await endpoint.endpoint()).body_iterator:
        picture = ClusterPicture.model_validate_json(text.partition("data: ")[2])
        assert not picture.ready and picture.reason is not None and "studio:52415" in picture.reason
        break
