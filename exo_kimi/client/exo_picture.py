"""An exo cluster as the page shows it, read from exo's own state."""

from __future__ import annotations

import time
from collections.abc import Iterable

from exo_kimi.page.cluster_state import ClusterPicture, StageView
from exo_kimi.plugin.control.state import ANSWERS, ClusterState, Instance, Node, Runner, Shard

# What a runner's phase is in the words of our stages.
_STATES = {
    "RunnerReady": "ready",
    "RunnerRunning": "ready",
    "RunnerLoading": "loading",
    "RunnerFailed": "dead",
    "RunnerShutdown": "dead",
    "RunnerShuttingDown": "dead",
}


def exo_picture(state: ClusterState) -> ClusterPicture:
    """Every node with the layers that its runners hold; a node of several instances is there once for each.

    exo tells neither tokens nor requests, so there are none.

    Args:
        state: one look at it.
    """
    views = [view for instance in state.instances for view in _views(state, instance)]
    busy = {view.id.partition(" ")[0] for view in views}
    views += [_idle(state, node) for node in state.nodes if node.node_id not in busy]
    waiting = list(dict.fromkeys(_waiting(state)))
    models = sorted({instance.model_id for instance in state.instances})
    return ClusterPicture(
        kind="exo",
        time_s=time.monotonic(),
        ready=bool(state.instances) and not waiting,
        reason="; ".join(waiting) if state.instances else "no model is placed",
        model=", ".join(models) or None,
        version=None,
        context=0,
        stages=views,
        requests=[],
        totals=None,
        prediction=None,
        events=[],
    )


def _waiting(state: ClusterState) -> Iterable[str]:
    for instance in state.instances:
        for shard in instance.shards:
            phase = _runner(state, shard).phase
            if phase not in ANSWERS:
                yield f"{instance.model_id} on {_name(state, shard)}: {phase.removeprefix('Runner')}"


def _views(state: ClusterState, instance: Instance) -> Iterable[StageView]:
    for shard in instance.shards:
        runner, node = _runner(state, shard), state.node(shard.node_id)
        yield StageView(
            id=f"{shard.node_id} {shard.runner_id}",
            name=f"{shard.rank} · {_name(state, shard)}",
            address=instance.model_id,
            state=_STATES.get(runner.phase, "starting"),
            start_layer=shard.start_layer,
            end_layer=shard.end_layer,
            loaded_bytes=runner.layers_loaded,
            total_bytes=runner.total_layers,
            weights_bytes=0 if node is None else node.total_bytes - node.available_bytes,
            memory_bytes=None if node is None else node.total_bytes,
            last_error=runner.message or None,
        )


def _idle(state: ClusterState, node: Node) -> StageView:
    return StageView(
        id=node.node_id,
        name=state.names[node.node_id],
        address=node.chip,
        state="ready",
        start_layer=None,
        end_layer=None,
        weights_bytes=node.total_bytes - node.available_bytes,
        memory_bytes=node.total_bytes,
    )


def _runner(state: ClusterState, shard: Shard) -> Runner:
    return state.runners.get(shard.runner_id, Runner(phase="RunnerIdle"))


def _name(state: ClusterState, shard: Shard) -> str:
    return state.names.get(shard.node_id, shard.node_id[:8])
