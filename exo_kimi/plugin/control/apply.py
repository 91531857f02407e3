"""`exo-kimi exo apply`: place a plan in a running exo, watch every node until it answers, take it back when it does not."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exo_kimi.errors import (
    ExoDeletedError,
    ExoKimiError,
    ExoLoadError,
    ExoPlacementError,
    ExoRefusedError,
    UsageError,
)
from exo_kimi.planner.plan import Engine, Plan, check_headroom
from exo_kimi.plugin.control.engines import ask_engines, check_engines
from exo_kimi.plugin.control.http import ExoClient, Preview
from exo_kimi.plugin.control.instance import (
    PORTS,
    MakeId,
    NodeAssignment,
    assign_nodes,
    check_assignments,
    check_machines,
    missing_links,
    new_id,
    renamed,
    ring_instance,
    unmeasured,
)
from exo_kimi.plugin.control.model_card import Card
from exo_kimi.plugin.control.model_names import check_model_id
from exo_kimi.plugin.control.replace import Replacement, with_memory_back
from exo_kimi.plugin.control.state import ClusterState
from exo_kimi.plugin.control.watch import Deadlines, LoadingProgress, Timing, take_back, watch
from exo_kimi.plugin.runner.options import EXPERT_CACHE

Report = Callable[[Sequence[LoadingProgress]], None]
Say = Callable[[str], None]
_PROBE_TOKENS = 2  # the first comes from prefill alone; decoding may still hang
_TENSOR_METAS = ("MlxJaccl", "MlxRing")  # RDMA first: 122 all-reduces a token want it


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """A placed plan.

    Args:
        instance_id: ours; `DELETE /instance/ID` ends it.
        model_id: for requests.
        engine: that must run it: `exo-kimi` where every node was started by `exo-kimi exo run`.
        assignments: in rank order.
        layers_seen: node name -> layers that exo said it was loading there; a node that loaded between two looks is missing.
        seconds: from the request to the first answer; 0 when nobody waited.
        answer: the text of the first two tokens; None when nobody waited.
    """

    instance_id: str
    model_id: str
    engine: Engine
    assignments: tuple[NodeAssignment, ...]
    layers_seen: Mapping[str, int]
    seconds: float
    answer: str | None


def apply_plan(
    client: ExoClient,
    plan: Plan,
    *,
    model_id: str | None = None,
    nodes: Mapping[str, str] | None = None,
    tensor: bool = False,
    replace: bool = False,
    ending: Collection[str] = (),
    make_id: MakeId = new_id,
    port: int | None = None,
    force: bool = False,
    wait: bool = True,
    our_engine: bool | None = None,
    deadlines: Deadlines | None = None,
    report: Report = lambda progress: None,
    say: Say = lambda line: None,
    timing: Timing | None = None,
) -> Applied:
    """Place a plan.

    Args:
        client: a node of the cluster.
        plan: for this cluster, as `exo plan` makes it.
        model_id: `org/name`; from the plan when it was made for such a name.
        nodes: machine of the plan -> name or id of a node, where the names differ.
        tensor: the plan's nodes, but every one with a slice of every layer, as exo places it.
        replace: end instances of this model first, instead of refusing; once the plan is known to fit with their memory
            counted back, and with the same placed again when it fails.
        ending: ids of instances to end first in the same way, of any model; with them and without `replace`, no others of this
            model are ended.
        make_id: gives the ids of its runners, then its own.
        port: of the ring on every node; a random one when not given.
        force: place a plan that has a machine over its limit.
        wait: until its nodes have found each other, and until it answers; else until exo has taken the instance.
        our_engine: whether exo was started by `exo-kimi exo run`; None follows the plan, which was made for one engine.
        deadlines: of the phases.
        report: called when anything has changed.
        say: told what is waited for, ended and placed again.
        timing: clock and sleep, for tests.

    Raises:
        UsageError: no model id, or another engine than the plan was made for.
        PlanInfeasibleError: the plan itself has a machine over its limit.
        ExoPlacementError: the cluster cannot take it; nothing was sent, and what was ended is placed again.
        ExoLoadError: it did not become ready; it was taken back, and what was ended is placed again.
        ExoUnreachableError, ExoVersionError, ExoRefusedError: as `ExoClient`.
    """
    limits, times = deadlines or Deadlines(), timing or Timing()
    check_headroom(plan, force=force)
    name = check_model_id(model_id or plan.model.name.replace("--", "/", 1))
    engine = _engine(plan, our_engine, tensor=tensor)
    check_machines(plan, nodes or {})
    for stage in plan.stages:
        if stage.expert_slots is not None:
            say(
                f"{stage.machine} reads experts from disk: start exo there with {EXPERT_CACHE}={stage.expert_cache_bytes}"
            )
    state, assignments = _assigned(client, plan, nodes or {}, limits, times, say, wait=wait)
    if engine == "exo-kimi":
        check_engines(ask_engines(client, state), assignments)
    placed = [instance for instance in state.instances if instance.model_id == name]
    older = [each for each in state.instances if each.instance_id in ending or (replace and each.model_id == name)]
    if remaining := [instance for instance in placed if instance not in older]:
        raise ExoPlacementError(
            f"{name} is placed already",
            found=", ".join(instance.instance_id for instance in remaining),
            where=client.url,
            fix="--replace ends it first",
        )
    card = placed[0].card if placed else _card(client, name, assignments, times)
    _check_card(card, plan)
    without = with_memory_back(state, older)
    if tensor:
        _check_slices(card, assignments, without)
    else:
        check_assignments(assignments, without, card)
    replacement = Replacement(client, older, limits, times, say)
    try:
        replacement.end()
        state = client.state() if older else state
        if tensor:
            assignments, instance = _tensor(client, card, assignments, state, make_id)
        else:
            check_assignments(assignments, state, card)
            instance = ring_instance(
                assignments,
                state,
                card,
                port=port or random.randint(*PORTS),
                context=plan.workload.context,
                make_id=make_id,
            )
        started = times.clock()
        seen, answer = _placed(client, instance, name, assignments, limits, times, report, wait=wait)
    except BaseException as error:
        told = replacement.put_back(until_ready=wait and isinstance(error, ExoKimiError))
        if told and isinstance(error, ExoKimiError):
            error.what = f"{error.what}; {told}"
        raise
    return Applied(
        instance_id=next(iter(instance.values()))["instanceId"],
        model_id=name,
        engine=engine,
        assignments=assignments,
        layers_seen=seen,
        seconds=times.clock() - started if wait else 0.0,
        answer=answer,
    )


def _assigned(
    client: ExoClient,
    plan: Plan,
    nodes: Mapping[str, str],
    deadlines: Deadlines,
    timing: Timing,
    say: Say,
    *,
    wait: bool,
) -> tuple[ClusterState, tuple[NodeAssignment, ...]]:
    """The cluster, and a node of it for every stage; with `wait`, once these nodes are measured and have found each other.

    A node that has just come back is listed before exo has measured it and before its links are, and twice while exo
    remembers what it was called before.
    """
    end, said = timing.clock() + (deadlines.links_s if wait else 0.0), ""
    while True:
        state = client.state()
        try:
            assignments = assign_nodes(plan, state, nodes=nodes)
        except ExoPlacementError as error:
            if timing.clock() >= end:
                raise
            missing = error.what
        else:
            lacking = [*unmeasured(assignments, state), *missing_links(assignments, state)]
            if not lacking or timing.clock() >= end:
                return state, assignments
            missing = lacking[0].partition(":")[0]
        if missing != said:
            said = missing
            say(f"waiting for the nodes: {missing}")
        timing.sleep(deadlines.poll_s)


def _placed(
    client: ExoClient,
    instance: Mapping[str, Any],
    model_id: str,
    assignments: Sequence[NodeAssignment],
    deadlines: Deadlines,
    timing: Timing,
    report: Report,
    *,
    wait: bool,
) -> tuple[Mapping[str, int], str | None]:
    """Create an instance and watch it; taken back when that fails.

    Returns:
        Node name -> layers that it said it was loading, and the first answer when it was waited for.
    """
    body = next(iter(instance.values()))
    client.create(instance)
    try:
        seen = watch(
            client,
            body["instanceId"],
            model_id,
            {each.node_id: each for each in assignments},
            body["shardAssignments"]["nodeToRunner"],
            until_ready=wait,
            deadlines=deadlines,
            report=report,
            timing=timing,
        )
        if not wait:
            return seen, None
        return seen, _first_answer(client, body["instanceId"], model_id, assignments, deadlines)
    except BaseException as error:
        gone = take_back(client, body["instanceId"], deadlines, timing)
        if isinstance(error, ExoLoadError) and not gone:
            error.fix = (
                f"{error.fix or ''}; the instance {body['instanceId']} is still there: DELETE /instance/ID".lstrip("; ")
            )
        raise


def _first_answer(
    client: ExoClient, instance_id: str, model_id: str, assignments: Sequence[NodeAssignment], deadlines: Deadlines
) -> str:
    try:
        return client.answer(model_id, "Hello", max_tokens=_PROBE_TOKENS, timeout_s=deadlines.answer_s)
    except ExoRefusedError as error:
        state = client.state()
        there = all(state.node(each.node_id) is not None for each in assignments)
        if state.instance(instance_id) is None and there:
            raise ExoDeletedError(
                "the instance was deleted before its first answer",
                found=error.what,
                fix="somebody else did: apply again",
            ) from error
        raise


def _engine(plan: Plan, our_engine: bool | None, *, tensor: bool) -> Engine:
    """The engine that will run the plan: the one that it was made for, and no other.

    Raises:
        UsageError: what was asked for contradicts the plan, whose bytes would be wrong.
    """
    if tensor and our_engine:
        raise UsageError("--tensor is for exo's own engine, and --our-engine says that ours runs", fix="leave one out")
    asked: Engine = "exo" if tensor or our_engine is False else "exo-kimi" if our_engine else plan.engine
    if asked == "exo-kimi" and plan.engine == "exo":
        raise UsageError(
            "the plan was made for exo's own engine, and --our-engine says that ours runs",
            fix="leave --our-engine out, or plan again: `exo-kimi exo plan --our-engine`",
        )
    if asked == "exo" and plan.engine == "exo-kimi" and len(plan.stages) > 1:
        raise UsageError(
            "the plan counts embedding and head once, and exo's own engine holds them on every node",
            expected="a plan for exo's own engine",
            found="one for ours",
            fix="plan with `exo-kimi exo plan`; for our engine leave --tensor out and start exo by `exo-kimi exo run`",
        )
    return asked


def _card(client: ExoClient, model_id: str, assignments: Sequence[NodeAssignment], timing: Timing) -> Card:
    """exo's card of the model, made from the model's directory where exo has none."""
    if model_id not in client.model_ids():
        client.add_model(model_id)
        timing.sleep(1.0)  # the card goes round the cluster as an event
    card = client.state().cards.get(model_id)
    if card is not None:
        return card
    previews = client.previews(model_id, [each.node_id for each in assignments])
    cards = [preview.card for preview in previews if preview.card is not None]
    if not cards:
        raise ExoPlacementError(
            f"exo would not place {model_id} at all",
            found="; ".join(dict.fromkeys(preview.error for preview in previews if preview.error)) or "no preview",
            where=client.url,
        )
    return cards[0]


def _check_card(card: Card, plan: Plan) -> None:
    said = (int(card["nLayers"]), int(card["hiddenSize"]))
    planned = (plan.model.layers, plan.model.hidden_size)
    if said != planned:
        raise ExoPlacementError(
            "the plan is for another model than exo has under this id",
            expected=f"{planned[0]} layers, hidden size {planned[1]} ({plan.model.name})",
            found=f"{said[0]} layers, hidden size {said[1]} ({card['modelId']})",
        )


def _check_slices(card: Card, assignments: Sequence[NodeAssignment], state: ClusterState) -> None:
    slice_bytes = int(card["storageSize"]["inBytes"]) // len(assignments)
    small = [node for each in assignments if (node := state.node(each.node_id)) and node.available_bytes < slice_bytes]
    if small:
        raise ExoPlacementError(
            f"{state.names[small[0].node_id]} is too small for an equal slice",
            expected=f"{slice_bytes} bytes free",
            found=f"{small[0].available_bytes} bytes",
        )


def _tensor(
    client: ExoClient, card: Card, assignments: Sequence[NodeAssignment], state: ClusterState, make_id: MakeId
) -> tuple[tuple[NodeAssignment, ...], dict[str, Any]]:
    """exo's own tensor-parallel placement over the plan's nodes; the slices are equal, whatever the plan's shares were."""
    _check_slices(card, assignments, state)
    wanted = frozenset(each.node_id for each in assignments)
    previews = [p for p in client.previews(card["modelId"], sorted(wanted)) if p.sharding == "Tensor"]
    able = [p for meta in _TENSOR_METAS for p in previews if p.meta == meta and p.node_ids == wanted]
    if len(wanted) < 2 or not able:
        raise ExoPlacementError(
            "exo offers no tensor-parallel placement over these nodes",
            expected=f"{len(wanted)} nodes, two or more: {', '.join(each.name for each in assignments)}",
            found=_errors(previews),
            fix="without --tensor the plan's pipeline is placed",
        )
    layers = int(card["nLayers"])
    named = {each.node_id: each.name for each in assignments}
    ranked = next(iter(able[0].instance.values()))["shardAssignments"] if able[0].instance else {}
    ranks = {
        node: next(iter(ranked["runnerToShard"][runner].values()))["deviceRank"]
        for node, runner in ranked["nodeToRunner"].items()
    }
    slices = tuple(
        NodeAssignment(node_id=node, name=named[node], start_layer=0, end_layer=layers, need_bytes=0)
        for node in sorted(ranks, key=ranks.__getitem__)
    )
    return slices, renamed(able[0].instance or {}, make_id=make_id)


def _errors(previews: Sequence[Preview]) -> str:
    return "; ".join(dict.fromkeys(f"{p.meta}: {p.error or 'over other nodes'}" for p in previews)) or "no preview"
