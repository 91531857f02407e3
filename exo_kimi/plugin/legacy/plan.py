"""A plan as legacy exo can follow it: node ids, inclusive ranges, borders between 0 and 1.

Legacy exo cuts a model by fractions of its layers and truncates. A border of (cut + 0.5) / layers lies in the middle of a
layer's interval, so it truncates to the cut for every model size; exo's own rounding misplaces 30 of the 60 cuts of 61 layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from exo_kimi.errors import UsageError
from exo_kimi.planner.plan import Plan

Range = tuple[int, int]
Piece = tuple[str, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class PinnedNode:
    """A node and its layers, half-open."""

    node_id: str
    machine: str
    start_layer: int
    end_layer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PinnedPlan:
    """Who holds what, for as long as this node runs.

    Args:
        name: the model in exo's API.
        layers: of the model.
        model_hash: of the plan's model.
        nodes: every node with its layers, first layers first.
        stage: index of this node among them.
        tokens: that all sequences together may hold, prompt and reply.
    """

    name: str
    layers: int
    model_hash: str
    nodes: tuple[PinnedNode, ...]
    stage: int
    tokens: int

    @property
    def own(self) -> PinnedNode:
        """This node, with its layers."""
        return self.nodes[self.stage]

    @property
    def node_ids(self) -> tuple[str, ...]:
        """Of all nodes, in order."""
        return tuple(node.node_id for node in self.nodes)

    @property
    def digest(self) -> str:
        """Equal on nodes that follow one plan; it travels with every tensor."""
        nodes = [(node.node_id, node.start_layer, node.end_layer) for node in self.nodes]
        told = [self.name, self.layers, self.model_hash, nodes]
        return hashlib.sha256(repr(told).encode()).hexdigest()[:16]

    def range_of(self, node_id: str) -> Range:
        """A node's layers as legacy exo writes them: first and last."""
        node = self.nodes[self.node_ids.index(node_id)]
        return inclusive(node.start_layer, node.end_layer)

    def pieces(self, present: Collection[str]) -> list[Piece]:
        """What each node takes of any model, as fractions.

        Args:
            present: ids that exo sees now. While a node of the plan is away, those that are there share everything in the
                plan's proportion: it keeps exo's own models and its display working. A Kimi waits (see `legacy.node`).
        """
        nodes = [node for node in self.nodes if node.node_id in present] or [self.own]
        layers = sum(node.end_layer - node.start_layer for node in nodes)
        return _pieces([(node.node_id, node.end_layer - node.start_layer) for node in nodes], layers)


def inclusive(start_layer: int, end_layer: int) -> Range:
    """Legacy exo's first and last layer of our half-open range: the one place where the two meet."""
    return start_layer, end_layer - 1


def pin(plan: Plan, *, node_id: str | None, nodes: Sequence[str] = (), name: str | None = None) -> PinnedPlan:
    """Pin a plan, with this node's place in it.

    Args:
        plan: ours.
        node_id: what exo is started with (`--node-id`).
        nodes: `MACHINE=NODE_ID` where a node is not named after its machine.
        name: the model's in exo's API; None takes the plan's.

    Raises:
        UsageError: a machine without a node, a node id that the plan does not have, or two nodes of one id.
    """
    given = dict(_pair(text) for text in nodes)
    machines = [stage.machine for stage in plan.stages]
    strangers = sorted(set(given) - set(machines))
    if strangers:
        raise UsageError(f"{strangers[0]} is no machine of the plan", expected=", ".join(machines), where="--node")
    assignments = tuple(
        PinnedNode(
            node_id=given.get(stage.machine, stage.machine),
            machine=stage.machine,
            start_layer=stage.start_layer,
            end_layer=stage.end_layer,
        )
        for stage in plan.stages
    )
    ids = [each.node_id for each in assignments]
    if len(set(ids)) < len(ids):
        raise UsageError("two machines of the plan have one node id", found=", ".join(ids), where="--node")
    return PinnedPlan(
        name=name or plan.model.name,
        layers=plan.model.layers,
        model_hash=plan.model.hash,
        nodes=assignments,
        stage=_own_stage(ids, machines, node_id, given),
        tokens=plan.workload.context * plan.workload.concurrency,
    )


def _own_stage(ids: Sequence[str], machines: Sequence[str], node_id: str | None, given: Mapping[str, str]) -> int:
    if node_id in ids:
        return ids.index(node_id)
    named = ", ".join(
        ident if machine == ident else f"{ident} ({machine})" for ident, machine in zip(ids, machines, strict=True)
    )
    if node_id is None:
        fix = f"say which machine this is, after the two dashes: -- --node-id {ids[0]}"
    else:
        fix = f"one of them as --node-id, or before the two dashes: --node {machines[0]}={node_id}"
    raise UsageError(
        "this node is not in the plan", expected=f"--node-id of {named}", found=node_id or "no --node-id", fix=fix
    )


def _pieces(shares: Sequence[tuple[str, int]], layers: int) -> list[Piece]:
    pieces: list[Piece] = []
    start, cut = 0.0, 0
    for index, (node_id, count) in enumerate(shares):
        cut += count
        end = 1.0 if index == len(shares) - 1 else (cut + 0.5) / layers
        pieces.append((node_id, start, end))
        start = end
    return pieces


def _pair(text: str) -> tuple[str, str]:
    machine, equals, node = text.partition("=")
    if not (machine and equals and node):
        raise UsageError("cannot read a node", expected="MACHINE=NODE_ID", found=repr(text), where="--node")
    return machine, node
