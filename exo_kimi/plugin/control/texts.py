"""The texts of `exo-kimi exo status`, of loading and of what was placed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path
from shlex import quote

from exo_kimi.plugin.api.engine_route import NodeEngine
from exo_kimi.plugin.control.apply import Applied
from exo_kimi.plugin.control.cluster import link_kind
from exo_kimi.plugin.control.engines import engine_of_node, engine_of_rank
from exo_kimi.plugin.control.http import DEFAULT_URL
from exo_kimi.plugin.control.plan import ExoPlan
from exo_kimi.plugin.control.prepare import PreparedDirectory
from exo_kimi.plugin.control.state import ClusterState, Instance
from exo_kimi.plugin.control.watch import LoadingProgress
from exo_kimi.units import format_bytes, format_seconds

_TESTED = {"b5375f8ce": "exo b5375f8ce or later", "1.0.71": "exo 1.0.x"}


def status_text(state: ClusterState, *, where: str, engines: Mapping[str, NodeEngine] | None = None) -> str:
    """Machines, memory, engines, links and instances, with what is wrong and what to do about it.

    Args:
        state: of the cluster.
        where: it was asked.
        engines: of its nodes; None when they were not asked.
    """
    engines = engines or {}
    names = state.names
    lines = [f"{_TESTED[state.generation]} at {where}: {_count(len(state.nodes), 'node')}", ""]
    for node in state.nodes:
        if node.total_bytes:
            lines.append(
                f"{names[node.node_id]}  {node.chip}  {format_bytes(node.total_bytes)}, "
                f"{format_bytes(node.available_bytes)} free"
            )
        else:
            lines.append(f"{names[node.node_id]}  not measured yet")
        if node.node_id in engines:
            lines[-1] += f"  {engine_of_node(engines[node.node_id])}"
    if len(state.nodes) > 1:
        lines.append("")
    for one, other in permutations(state.nodes, 2):
        kind = link_kind(one, other, state)
        rdma = " and RDMA" if (one.node_id, other.node_id) in state.rdma else ""
        addresses = ", ".join(state.sockets.get((one.node_id, other.node_id), ()))
        way = (
            f"{kind} {addresses}{rdma}"
            if kind != "none"
            else "not reached: check cable, addresses and firewall (a node that has just come takes some 15 s)"
        )
        lines.append(f"{names[one.node_id]} -> {names[other.node_id]}  {way}")
    lines.append("")
    lines += [line for each in state.instances for line in _instance_lines(each, state, engines)] or ["no instances"]
    return "\n".join(lines) + "\n"


def progress_line(progress: Sequence[LoadingProgress]) -> str:
    """`studio Loading 12/44 | mini Connected`."""
    return " | ".join(
        f"{each.name} {each.phase}" + (f" {each.layers_loaded}/{each.layers}" if each.phase == "Loading" else "")
        for each in progress
    )


def planned_text(made: ExoPlan, *, output: str | Path | None, url: str) -> str:
    """The plan, and the command that places it where it was written to `output`."""
    if output is None:
        return made.text + "\n"
    named = "" if "/" in made.plan.model.name else " --model-id ORG/NAME"
    why = "; ORG/NAME is what `exo-kimi exo prepare` called it" if named else ""
    command = f"exo-kimi exo apply {quote(str(output))}{named}{_at(url)} --wait"
    return f"{made.text}\n\nwritten to {output}; place it: {command}{why}\n"


def applied_text(applied: Applied, *, url: str = DEFAULT_URL) -> str:
    """What was placed where, and how far it is."""
    lines = [f"{applied.model_id} is placed, instance {applied.instance_id}"]
    for rank, each in enumerate(applied.assignments):
        seen = applied.layers_seen.get(each.name)
        said = "" if seen is None else f", exo loaded {seen}"
        lines.append(f"  rank {rank}  {each.name}  layers {each.start_layer}:{each.end_layer} ({each.layers}{said})")
    if applied.engine == "exo-kimi":
        lines.append("  for our engine: every node must have been started by `exo-kimi exo run`")
    if applied.answer is not None:
        lines.append(f"it answers, {format_seconds(applied.seconds)} after it was asked for")
    else:
        lines.append(f"it is loading: `exo-kimi exo status{_at(url)}` shows how far")
    return "\n".join(lines) + "\n"


def prepared_text(prepared: PreparedDirectory) -> str:
    """What was made, and what the node needs to know."""
    lines = [
        f"{prepared.directory}",
        f"  {prepared.model_id}, layers {prepared.start_layer}:{prepared.end_layer} with embedding, norm and head",
        f"  {_count(len(prepared.weight_files), 'weight file')} linked, {format_bytes(prepared.linked_bytes)}; "
        f"the whole model has {format_bytes(prepared.total_bytes)}",
        *(f"  note: {note}" for note in prepared.notes),
        f"start exo on this node with EXO_MODELS_READ_ONLY_DIRS={quote(str(prepared.directory.parent.resolve()))}",
        "then, on a machine with all layers: "
        f"exo-kimi exo plan {quote(str(prepared.source))} --model-id {prepared.model_id} -o PLAN.json",
    ]
    return "\n".join(lines) + "\n"


def _instance_lines(instance: Instance, state: ClusterState, engines: Mapping[str, NodeEngine]) -> list[str]:
    lines = [f"{instance.model_id}  instance {instance.instance_id}"]
    for shard in instance.shards:
        name = state.names.get(shard.node_id)
        runner = state.runners.get(shard.runner_id)
        phase = runner.phase.removeprefix("Runner") if runner else "Waiting"
        told = f" {runner.layers_loaded}/{runner.total_layers}" if runner and phase == "Loading" else ""
        why = f": {runner.message}" if runner and runner.message else ""
        where = (
            f"layers {shard.start_layer}:{shard.end_layer}"
            if shard.kind == "Pipeline"
            else f"{shard.kind.lower()} slice"
        )
        if name is None:
            phase, told, why = "its node has left the cluster", "", "; `exo-kimi exo apply PLAN --replace` places anew"
        line = f"  rank {shard.rank}  {name or shard.node_id}  {where}  {phase}{told}{why}"
        if (engine := engines.get(shard.node_id)) is not None:
            line = "  ".join([line, *engine_of_rank(engine, instance.instance_id, shard.rank)])
        lines.append(line)
    return lines


def _at(url: str) -> str:
    """The option that says where exo is, where that is not the default."""
    return "" if url == DEFAULT_URL else f" --exo {quote(url)}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
