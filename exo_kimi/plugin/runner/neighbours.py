"""Whether the nodes of an instance can work together, asked of exo's API on each before any rank waits for another.

A node without our engine would wait in exo's own way, for ever, and be told as one that hangs.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx

from exo_kimi.errors import ExoPlacementError
from exo_kimi.plugin.api.engine_route import ask_engine
from exo_kimi.plugin.runner.assignment import NodeLayers
from exo_kimi.runtime.protocol.versions import Versions
from exo_kimi.runtime.transport.zmq_link import tcp_endpoint


def check_neighbours(own: NodeLayers, *, api_port: str | None) -> None:
    """Ask each rank that this one sees. A node that does not answer may be as it should: its rank will say.

    Args:
        own: this rank, and whom it sees.
        api_port: of exo's API on every node; None asks nobody.

    Raises:
        ExoPlacementError: a node without our engine, or with another version of it.
    """
    if api_port is None or not own.neighbours:
        return
    urls = [tcp_endpoint(address, int(api_port)).replace("tcp://", "http://") for _, address in own.neighbours]
    with httpx.Client(trust_env=False) as http, ThreadPoolExecutor(len(urls)) as pool:
        engines = list(pool.map(lambda url: ask_engine(http, url), urls))
    mine = Versions.installed().exo_kimi
    for (rank, address), engine in zip(own.neighbours, engines, strict=True):
        where = f"rank {rank}, node {own.nodes[rank]} at {address}"
        if engine.engine == "exo" and engine.node_id == own.nodes[rank]:
            raise ExoPlacementError(
                f"{own.nodes[rank]} does not run exo-kimi's engine",
                expected="exo started by `exo-kimi exo run` on every node of the instance",
                found="exo's own engine (or an exo-kimi of before 0.3)",
                where=where,
                fix="there, in exo's folder: `uv run exo-kimi exo run -- ARGS` instead of `uv run exo ARGS`",
            )
        if engine.versions is not None and engine.versions.exo_kimi != mine:
            raise ExoPlacementError(
                "two nodes have different versions of exo-kimi",
                expected=f"{mine}, as on {own.nodes[own.stage]} (rank {own.stage})",
                found=engine.versions.exo_kimi,
                where=where,
                fix="install the same exo-kimi into exo's environment on both, and start exo there again",
            )
