"""`/v1/cluster/events`: the cluster's states as server-sent events, each one whole."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from starlette.responses import StreamingResponse

from exo_kimi.page.cluster_state import ClusterPicture

INTERVAL_S = 0.25  # between two looks; what changed in between is in the next state
SILENCE_S = 2.0  # an unchanged state is sent again after so long, so that a reader sees that the server is there

Look = Callable[[], Awaitable[ClusterPicture]]


def cluster_events(look: Look, *, interval_s: float = INTERVAL_S, silence_s: float = SILENCE_S) -> StreamingResponse:
    """A response that sends `event: state` whenever the state changed, until its reader leaves.

    A slow reader gets fewer states, never old ones: the next look is taken when the last state is sent.

    Args:
        look: takes one look at the cluster.
        interval_s: between looks.
        silence_s: longest time without a state.
    """
    return StreamingResponse(
        _events(look, interval_s, silence_s),
        media_type="text/event-stream",
        headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
    )


async def _events(look: Look, interval_s: float, silence_s: float) -> AsyncIterator[str]:
    last, sent_s = "", 0.0
    while True:
        state = await look()
        now_s = time.monotonic()
        text = state.model_dump_json(exclude={"time_s": True, "stages": {"__all__": {"silent_s"}}})
        if text != last or now_s - sent_s >= silence_s:
            last, sent_s = text, now_s
            yield f"event: state\ndata: {state.model_dump_json()}\n\n"
        await asyncio.sleep(interval_s)
