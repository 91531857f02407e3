"""Which engine each node of a cluster has: asked of the nodes themselves, and checked before a plan for ours is placed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from exo_kimi.errors import ExoPlacementError
from exo_kimi.plugin.api.engine_route import NodeEngine
from exo_kimi.plugin.control.http import ExoClient
from exo_kimi.plugin.control.instance import NodeAssignment
from exo_kimi.plugin.control.state import ClusterState

_ASK_AT_ONCE = 16
_UNKNOWN = NodeEngine(engine="unknown")


def ask_engines(client: ExoClient, state: ClusterState) -> Mapping[str, NodeEngine]:
    """Ask every node, at every address by which another has reached it, all at once.

    Args:
        client: of one node, whose port all have.
        state: of the cluster.

    Returns:
        Node id -> its engine; `unknown` for one that cannot be reached from here.
    """
    addresses = dict.fromkeys((sink, address) for (_, sink), found in state.sockets.items() for address in found)
    with ThreadPoolExecutor(_ASK_AT_ONCE) as pool:
        own = pool.submit(client.engine)
        others = [pool.submit(client.engine, client.url_of(address)) for _, address in addresses]
        answers = [each.result() for each in (own, *others)]
    found = {answer.node_id: answer for answer in answers if answer.engine != "unknown"}
    return {node.node_id: found.get(node.node_id, _UNKNOWN) for node in state.nodes}


def check_engines(engines: Mapping[str, NodeEngine], assignments: Sequence[NodeAssignment]) -> None:
    """A plan for our engine wants it on every node, in one version. A node that did not answer may have it.

    Raises:
        ExoPlacementError: a node without it, or with another version.
    """
    without = [each.name for each in assignments if engines[each.node_id].engine == "exo"]
    if without:
        raise ExoPlacementError(
            f"{' and '.join(without)} {'does' if len(without) == 1 else 'do'} not run exo-kimi's engine",
            expected="exo-kimi's engine on every node of the plan",
            found="exo's own engine (or an exo-kimi of before 0.3)",
            fix="start exo there by `uv run exo-kimi exo run -- ARGS` instead of `uv run exo ARGS`, or plan without --our-engine",
        )
    versions = {
        each.name: engine.versions.exo_kimi for each in assignments if (engine := engines[each.node_id]).versions
    }
    if len(set(versions.values())) > 1:
        raise ExoPlacementError(
            "the nodes have different versions of exo-kimi",
            expected="one version",
            found=", ".join(f"{name}: {version}" for name, version in versions.items()),
            fix="install the same exo-kimi into exo's environment on all of them, and start exo there again",
        )


def engine_of_node(engine: NodeEngine) -> str:
    """For a line about a node."""
    if engine.versions is None:
        return (
            "exo's own engine only (not started by `exo-kimi exo run`)" if engine.engine == "exo" else "does not answer"
        )
    return f"exo-kimi {engine.versions.exo_kimi}, mlx {engine.versions.mlx}"


def engine_of_rank(engine: NodeEngine, instance_id: str, rank: int) -> Iterator[str]:
    """For a line about a rank: whose engine runs it and why, and what it waits for."""
    report = engine.runners.get((instance_id, rank))
    if report is not None:
        why = "" if report.why is None else f" ({report.why})"
        yield f"{report.engine}'s engine{why}"
        if report.waits_for is not None:
            yield report.waits_for
    elif engine.engine == "exo":
        yield "exo's engine"
