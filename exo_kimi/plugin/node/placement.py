"""Our planner behind exo's own doors: a Kimi placed from the dashboard or by `/place_instance` gets our split.

Four names of exo's API are bound, in this node's process. The dashboard asks for a preview and posts what it gets back, so a
preview that is ours becomes an instance that is ours; `/place_instance` sends our instance where exo would have let its master
choose. Only pipelines of Kimi K2 models are touched: tensor parallelism stays exo's, and on RDMA the nodes and their order do.
"""

from __future__ import annotations

import functools
import importlib
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

from exo_kimi.checkpoint.text_files import read_kimi_config
from exo_kimi.errors import CheckpointError, ExoKimiError, ExoPlacementError, PlanInfeasibleError
from exo_kimi.planner.plan import Plan
from exo_kimi.plugin.bindings import CHOOSE_PLACEMENT, PLACING, mismatches
from exo_kimi.plugin.control.command import model_directories
from exo_kimi.plugin.control.instance import (
    PORTS,
    NodeAssignment,
    assign_nodes,
    check_assignments,
    check_instance,
    missing_links,
    ring_instance,
    unmeasured,
)
from exo_kimi.plugin.control.model_card import Card
from exo_kimi.plugin.control.model_names import directory_name, names_a_kimi
from exo_kimi.plugin.control.plan import ExoPlan, exo_plan
from exo_kimi.plugin.control.state import ClusterState, parse_state
from exo_kimi.plugin.node.keeper import KeptPlan
from exo_kimi.plugin.runner.options import EngineOptions
from exo_kimi.units import format_bytes

_MOST_ORDERS = 120  # of five nodes; a plan takes some milliseconds, and exo's event loop waits for it
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedPlacement:
    """What somebody asks exo to place.

    Args:
        card: the model's, as exo's JSON.
        ring: over addresses; else over RDMA.
        min_nodes: at least so many.
        required: ids of nodes that must take part.
    """

    card: Card
    ring: bool
    min_nodes: int = 1
    required: frozenset[str] = frozenset()

    @property
    def model_id(self) -> str:
        """exo's."""
        return str(self.card["modelId"])


@dataclass(frozen=True, slots=True)
class _Chosen:
    """A plan, and the nodes that it gets."""

    plan: Plan
    assignments: tuple[NodeAssignment, ...]


@dataclass(slots=True)
class PlacementPlanner:
    """Answers placements with our split.

    Args:
        kept: plans to take for their models while their nodes are there.
        models_dirs: where this node's models are.
        say: told each split that differs from the last of its kind.
    """

    kept: Sequence[KeptPlan]
    models_dirs: Sequence[Path]
    say: Say
    _plans: dict[object, ExoPlan | ExoKimiError] = field(default_factory=dict)
    _said: dict[object, str] = field(default_factory=dict)

    def takes(self, card: Card) -> bool:
        """Whether a model is for our engine, as `not_ours` judges it in its runners."""
        if "kimi" not in str(card.get("family", "")).lower() and not names_a_kimi(str(card["modelId"])):
            return False
        directory = self._directory(str(card["modelId"]))
        if directory is None:
            return True
        try:
            read_kimi_config(directory)
        except CheckpointError:
            return False
        return True

    def ring(self, wanted: WantedPlacement, state: ClusterState) -> dict[str, Any] | None:
        """An instance with our split.

        Args:
            wanted: of a model that it `takes`.
            state: the cluster now.

        Returns:
            exo's JSON; None where no plan can be made on this node, and exo's own split is taken.

        Raises:
            ExoPlacementError, PlanInfeasibleError: the cluster cannot take it.
        """
        found = self._from_kept(wanted, state)
        source = "the kept plan"
        if found is None:
            source = "planned now"
            found = self._planned(wanted, state)
        if found is None:
            return None
        check_assignments(found.assignments, state, wanted.card)
        self._tell(wanted, found, source)
        return ring_instance(
            found.assignments, state, wanted.card, port=random.randint(*PORTS), context=found.plan.workload.context
        )

    def moved(self, wanted: WantedPlacement, state: ClusterState, instance: Mapping[str, Any]) -> dict[str, Any] | None:
        """An instance of exo's own choosing with our split: the same nodes in the same order, other boundaries.

        Raises:
            ExoPlacementError, PlanInfeasibleError: these nodes cannot take it.
        """
        ((kind, body),) = instance.items()
        assigned = body["shardAssignments"]
        nodes = {runner: node for node, runner in assigned["nodeToRunner"].items()}
        shards = {runner: next(iter(shard.values())) for runner, shard in assigned["runnerToShard"].items()}
        ranked = sorted(shards, key=lambda runner: int(shards[runner]["deviceRank"]))
        if any(next(iter(shard)) != "PipelineShardMetadata" for shard in assigned["runnerToShard"].values()):
            return None
        made = self._plan(wanted.model_id, state, [nodes[runner] for runner in ranked])
        if made is None:
            return None
        found = _Chosen(made.plan, assign_nodes(made.plan, state))
        ranges = {each.node_id: (each.start_layer, each.end_layer) for each in found.assignments}
        card = {**wanted.card, "contextLength": made.plan.workload.context}
        placed = {
            runner: {
                "PipelineShardMetadata": {
                    **shards[runner],
                    "modelCard": card,
                    "startLayer": ranges[nodes[runner]][0],
                    "endLayer": ranges[nodes[runner]][1],
                }
            }
            for runner in ranked
        }
        ours = {kind: {**body, "shardAssignments": {**assigned, "runnerToShard": placed}}}
        check_instance(ours)
        self._tell(wanted, found, "planned now" if kind == "MlxRingInstance" else "planned now, on RDMA")
        return ours

    def _from_kept(self, wanted: WantedPlacement, state: ClusterState) -> _Chosen | None:
        for kept in self.kept:
            if kept.model_id != wanted.model_id:
                continue
            try:
                found = assign_nodes(kept.plan, state, nodes=kept.nodes)
            except ExoPlacementError:
                return None
            there = not unmeasured(found, state) and not missing_links(found, state)
            return _Chosen(kept.plan, found) if there and _suits(found, wanted) else None
        return None

    def _planned(self, wanted: WantedPlacement, state: ClusterState) -> _Chosen | None:
        """The best plan that takes enough nodes, and those that must be there; over few nodes before many."""
        free = self._plan(wanted.model_id, state, ())
        if free is None:
            return None
        found = assign_nodes(free.plan, state)
        if _suits(found, wanted):
            return _Chosen(free.plan, found)
        measured = [node for node in state.nodes if node.total_bytes]
        by_memory = sorted(measured, key=lambda node: -node.total_bytes)
        refused: ExoKimiError | None = None
        for count in range(max(wanted.min_nodes, len(wanted.required)), len(by_memory) + 1):
            made: list[ExoPlan] = []
            for order in _orders([node.node_id for node in by_memory], count, wanted.required):
                try:
                    plan = self._plan(wanted.model_id, state, order)
                except (PlanInfeasibleError, ExoPlacementError) as error:
                    refused = refused or error
                    continue
                if plan is not None and not missing_links(assign_nodes(plan.plan, state), state):
                    made.append(plan)
            if made:
                best = min(made, key=lambda each: each.plan.prediction.request_s)
                return _Chosen(best.plan, assign_nodes(best.plan, state))
        raise refused or ExoPlacementError(
            "no plan over so many nodes",
            expected=f"{wanted.min_nodes} nodes that reach each other",
            found=len(measured),
        )

    def _plan(self, model_id: str, state: ClusterState, order: Sequence[str]) -> ExoPlan | None:
        """Our plan over these nodes in this order, else over the best; None where this node has not all layers."""
        directory = self._directory(model_id)
        if directory is None:
            self._leave(model_id, "this node does not have its files")
            return None
        key = (directory, tuple(order), _what_matters(state))
        if key not in self._plans:
            if len(self._plans) > 4 * _MOST_ORDERS:
                self._plans.clear()
            self._plans[key] = self._plan_or_why_not(model_id, directory, state, order)
        made = self._plans[key]
        if isinstance(made, CheckpointError):
            self._leave(model_id, f"this node cannot plan it: {made.what}")
            return None
        if isinstance(made, ExoKimiError):
            raise made
        return made

    def _plan_or_why_not(
        self, model_id: str, directory: Path, state: ClusterState, order: Sequence[str], *, raised: bool = False
    ) -> ExoPlan | ExoKimiError:
        """A plan by the wired limits as macOS sets them, else by raised ones: exo does not say what they are set to."""
        try:
            made = exo_plan(
                state,
                directory,
                model_id=model_id,
                context=EngineOptions.from_environment().context,
                our_engine=True,
                raise_limits=raised,
                nodes=[state.names[node_id] for node_id in order],
            )
        except PlanInfeasibleError as error:
            second = error if raised else self._plan_or_why_not(model_id, directory, state, order, raised=True)
            return error if isinstance(second, PlanInfeasibleError) else second
        except ExoKimiError as error:
            return error
        needed = "; ".join(f"{stage.machine}: {stage.sysctl}" for stage in made.plan.stages if stage.sysctl)
        if needed:
            self._tell_line((model_id, *order), f"{model_id} counts on raised wired limits: {needed}")
        return made

    def _directory(self, model_id: str) -> Path | None:
        named = directory_name(model_id)
        return next((each / named for each in self.models_dirs if (each / named / "config.json").exists()), None)

    def _leave(self, model_id: str, why: str) -> None:
        line = (
            f"{model_id} gets exo's own split: {why}; keep a plan for it (`exo-kimi exo run --keep PLAN.json`), "
            "or ask a node that has all layers"
        )
        self._tell_line(model_id, line)

    def _tell(self, wanted: WantedPlacement, found: _Chosen, source: str) -> None:
        split = ", ".join(
            f"{each.name} {each.start_layer}:{each.end_layer} ({format_bytes(each.need_bytes)})"
            for each in found.assignments
        )
        kind = (wanted.model_id, wanted.ring, wanted.min_nodes, wanted.required)
        self._tell_line(kind, f"{wanted.model_id} gets our split, {source}: {split}")

    def _tell_line(self, kind: object, line: str) -> None:
        if self._said.get(kind) != line:
            self._said[kind] = line
            self.say(line)


def _suits(found: Sequence[NodeAssignment], wanted: WantedPlacement) -> bool:
    return len(found) >= wanted.min_nodes and wanted.required <= {each.node_id for each in found}


def _orders(nodes: Sequence[str], count: int, required: frozenset[str]) -> Iterator[tuple[str, ...]]:
    """Orders of `count` nodes with those that are required; the largest first, and no more than can be planned at once."""
    made = 0
    for chosen in combinations(nodes, count):
        if not required <= set(chosen):
            continue
        for order in permutations(chosen):
            if made == _MOST_ORDERS:
                return
            made += 1
            yield order


def _what_matters(state: ClusterState) -> tuple[object, ...]:
    """What a plan hangs on; the free memory of this second does not."""
    nodes = tuple((node.node_id, node.name, node.chip, node.total_bytes) for node in state.nodes)
    return nodes, tuple(sorted(state.sockets.items())), state.rdma


_now: ContextVar[Any] = ContextVar("exo_kimi_api")


def bind_planner(kept: Sequence[KeptPlan], say: Say) -> tuple[str, ...]:
    """Bind our planner into the exo of this process, if its API is as it was in the tested ones, and say what was done.

    Args:
        kept: plans to take for their models.
        say: takes lines for the user.

    Returns:
        What differs; then nothing is bound.
    """
    found = mismatches(PLACING)
    if found:
        for line in found:
            say(f"exo-kimi: {line}")
        say("exo-kimi: what is placed from exo's dashboard gets exo's own split")
        return found
    main: Any = importlib.import_module(CHOOSE_PLACEMENT.module)
    if hasattr(main.API.place_instance, "exo_kimi"):
        return ()
    from exo_kimi.plugin.node.command import tell_exos_log

    planner = PlacementPlanner(kept, model_directories(os.environ), tell_exos_log)
    main.get_instance_placements = _choosing(main.get_instance_placements, planner, main)
    for name in ("get_placement", "get_placement_previews"):
        setattr(main.API, name, _with_state(getattr(main.API, name)))
    main.API.place_instance = _placing(main.API.place_instance, planner, main)
    say("exo-kimi: Kimi models placed from exo's dashboard get our split (--no-plan leaves them exo's)")
    return ()


@contextmanager
def _asked(api: Any) -> Iterator[None]:
    token = _now.set(api)
    try:
        yield
    finally:
        _now.reset(token)


def _with_state(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of exo's API that chooses a placement, with its object told to `get_instance_placements`."""

    @functools.wraps(method)
    async def choose(self: Any, *args: Any, **options: Any) -> Any:
        with _asked(self):
            return await method(self, *args, **options)

    return choose


def _choosing(original: Callable[..., Any], planner: PlacementPlanner, main: Any) -> Callable[..., Any]:
    """exo's `place_instance`, as its API knows it, which gives all instances with one more."""

    @functools.wraps(original)
    def choose(command: Any, *args: Any, **options: Any) -> Any:
        api = _now.get(None)
        card = _json(command.model_card)
        if api is None or command.sharding != "Pipeline" or not planner.takes(card):
            return original(command, *args, **options)
        required = frozenset(map(str, options.get("required_nodes") or ()))
        wanted = WantedPlacement(
            card=card,
            ring=command.instance_meta == "MlxRing",
            min_nodes=command.min_nodes,
            required=required,
        )
        current = options["current_instances"]
        with _as_value_error():
            state = parse_state(_json(api.state), where="this node")
            if wanted.ring:
                made = planner.ring(wanted, state)
                return original(command, *args, **options) if made is None else _added(current, made, main)
            placed = original(command, *args, **options)
            ((instance_id, chosen),) = [(key, each) for key, each in placed.items() if key not in current]
            made = planner.moved(wanted, state, _json(chosen))
        return placed if made is None else {**placed, instance_id: _instance(made, main)}

    return choose


def _placing(original: Callable[..., Any], planner: PlacementPlanner, main: Any) -> Callable[..., Any]:
    """exo's `/place_instance`, which has the master choose: for our models, what this node chooses is created."""

    @functools.wraps(original)
    async def place_instance(self: Any, payload: Any) -> Any:
        card = await main.ModelCard.load(payload.model_id)
        if payload.sharding != "Pipeline" or not planner.takes(_json(card)):
            return await original(self, payload)
        instance = await self.get_placement(
            payload.model_id, payload.sharding, payload.instance_meta, payload.min_nodes
        )
        command = main.CreateInstance(instance=instance)
        await self._send(command)
        return main.CreateInstanceResponse(message="Command received.", command_id=command.command_id, model_card=card)

    place_instance.exo_kimi = True  # type: ignore[attr-defined]
    return place_instance


def _added(current: Mapping[Any, Any], made: dict[str, Any], main: Any) -> dict[Any, Any]:
    instance = _instance(made, main)
    return {**current, instance.instance_id: instance}


def _instance(made: dict[str, Any], main: Any) -> Any:
    return main.CreateInstanceParams.model_validate({"instance": made}).instance


def _json(model: Any) -> Any:
    return model.model_dump(mode="json", by_alias=True)


@contextmanager
def _as_value_error() -> Iterator[None]:
    """exo's API shows a ValueError of its placement to whoever asked."""
    try:
        yield
    except ExoKimiError as error:
        raise ValueError(f"exo-kimi: {' '.join(str(error).split())}") from error
