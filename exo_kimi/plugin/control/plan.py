"""`exo-kimi exo plan`: the cluster as exo sees it, our plan for it, and what exo alone would have done beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from exo_kimi.arch.config import KimiConfig
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.errors import UsageError
from exo_kimi.fetch.directories import pulled_directory
from exo_kimi.planner.answer import Answer, answer, plan_of
from exo_kimi.planner.command import model_bytes
from exo_kimi.planner.plan import Plan
from exo_kimi.planner.question import Question
from exo_kimi.planner.search.cost import PlacedSplit
from exo_kimi.planner.search.tensor import TensorOption, tensor_options
from exo_kimi.planner.weights.bytes import ModelBytes, bytes_of_manifest
from exo_kimi.planner.workload import RESERVE_BYTES, SCORE_BYTES, Objective, Workload, make_workload
from exo_kimi.plugin.control.cluster import cluster_of_state
from exo_kimi.plugin.control.exo_default_split import layers_by_memory, nodes_by_memory
from exo_kimi.plugin.control.model_names import check_model_id, default_model_id, directory_name
from exo_kimi.plugin.control.state import ClusterState
from exo_kimi.plugin.ours_alone import runs_on_ours_alone
from exo_kimi.units import format_bytes

# exo prefills 4,096 tokens at once, divided by up to 4 nodes. Source: exo `generator/generate.py` at b5375f8ce.
_PREFILL_STEP, _MOST_PARTS = 4096, 4
# Rotary scores are held whole, and once more masked, in bf16. Source: mlx-lm `models/deepseek_v3.py`, `pe_scores`.
_SCORE_COPIES, _SCORE_ELEMENT_BYTES = 2, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ExoPlan:
    """A plan for an exo cluster.

    Args:
        answer: ours; its model's name is exo's id.
        alone: what exo would have placed by itself, with our bytes and times; None where it would have refused.
        tensor: the fastest tensor-parallel placement, when that is faster than the plan.
    """

    answer: Answer
    alone: Plan | None
    tensor: TensorOption | None

    @property
    def plan(self) -> Plan:
        """Ours, for a file and for `exo apply`."""
        return self.answer.plan

    @property
    def text(self) -> str:
        """Both, for the terminal."""
        parts = [self.answer.text, "exo alone: " + _alone_line(self.alone, self.plan)]
        if self.tensor is not None:
            machines = self.tensor.machines
            fits = self.plan.engine == "exo" and {stage.machine for stage in self.plan.stages} == set(machines)
            first = "" if fits else f"plan without --our-engine and with --nodes {','.join(machines)}, then "
            parts.append(
                f"tensor parallel over {', '.join(machines)} is faster: {1 / self.tensor.tpot_s:.1f} tokens/s. "
                f"Place it with exo's own engine: {first}`exo-kimi exo apply PLAN.json --tensor`"
            )
        return "\n".join(parts)


def exo_plan(
    state: ClusterState,
    model: str | Path,
    *,
    model_id: str | None = None,
    recipe: str | Path | None = None,
    models_dirs: Sequence[str | Path] = (),
    context: int | None = None,
    concurrency: int = 1,
    objective: Objective = "request",
    reserve_bytes: int = RESERVE_BYTES,
    our_engine: bool = False,
    raise_limits: bool = False,
    split: Sequence[int] | None = None,
    nodes: Sequence[str] = (),
    force: bool = False,
) -> ExoPlan:
    """The best plan for a running exo cluster.

    Args:
        state: the cluster.
        model: a checkpoint directory with all layers, an exo id whose directory is in `models_dirs`, or a published name.
        model_id: exo's id of it; `default_model_id` of the directory when not given.
        recipe: for a published name.
        models_dirs: where exo ids are looked up.
        context: tokens of one sequence.
        concurrency: sequences at once.
        objective: what is minimised.
        reserve_bytes: kept free on every machine.
        our_engine: for an exo that `exo-kimi exo run` started; exo's own engine holds embedding and head on every rank, and
            its scores in memory.
        raise_limits: count on raised wired limits.
        split: judge these layer counts, over `nodes`, else over the nodes by memory, the largest first, instead of searching.
        nodes: names or ids of those that get a stage, first layers first; which and how is searched when not given.
        force: take `split` even where a node is over its limit.

    Raises:
        UsageError: the model is not found, or an id that exo would not take for a Kimi.
        CheckpointError: the checkpoint is not sound.
        ExoPlacementError: exo has measured no node.
        PlanInfeasibleError: nothing fits, or the given split does not.
    """
    weights, cluster = _weights(model, model_id, recipe, models_dirs), cluster_of_state(state)
    alone = runs_on_ours_alone(weights.config)
    if alone is not None and not our_engine:
        raise UsageError(
            f"{alone} run on exo-kimi's engine alone",
            expected="--our-engine, in an exo that `exo-kimi exo run` started",
            found="exo's own engine, which does not know them",
            where=weights.name,
        )
    count = len(split or nodes or cluster.machines)
    workload = _workload(weights.config, context, concurrency, reserve_bytes, 0 if our_engine else count)
    everywhere = Question(model=weights, cluster=cluster, workload=workload, objective=objective)
    if raise_limits:
        everywhere = everywhere.with_raised_limits()
    named = [state.names.get(node, node) for node in nodes]
    question = everywhere.with_order(named, called="nodes") if named else everywhere
    ours = answer(question) if split is None else Answer.given(question, split, force=force, called="nodes")
    tensors = tensor_options(question) if alone is None else ()  # exo's own engine alone places them
    best = min(tensors, key=lambda option: option.tpot_s, default=None)
    return ExoPlan(
        answer=ours,
        alone=_alone(state, everywhere),
        tensor=best if best is not None and best.tpot_s < ours.plan.prediction.tpot_s else None,
    )


def _weights(
    model: str | Path, model_id: str | None, recipe: str | Path | None, models_dirs: Sequence[str | Path]
) -> ModelBytes:
    path = Path(model)
    named = directory_name(str(model))
    candidates = [path, *(Path(each) / named for each in models_dirs if "/" in str(model))]
    directory = next((each for each in candidates if each.is_dir()), None)
    if directory is None and recipe is None and (pulled := pulled_directory(str(model))) is not None:
        directory, model_id = pulled, model_id or str(model)
    if directory is None:
        weights = model_bytes(model=str(model), recipe=recipe)
        return replace(weights, name=check_model_id(model_id)) if model_id else weights
    if recipe is not None:
        raise UsageError("--recipe is for a published name: a directory's headers say what it holds", found=str(recipe))
    name = check_model_id(model_id or default_model_id(directory))
    return bytes_of_manifest(Checkpoint(directory).manifest(), name=name)


def _workload(
    config: KimiConfig, context: int | None, concurrency: int, reserve_bytes: int, exo_nodes: int
) -> Workload:
    """exo's API server runs on every node anyway, so none is counted; its engine's scores are added to the reserve."""
    ours = make_workload(config, context=context, concurrency=concurrency, reserve_bytes=reserve_bytes, server_bytes=0)
    if not exo_nodes:
        return ours
    added = max(0, exo_scores_bytes(config, ours.context, exo_nodes) - SCORE_BYTES)
    return replace(ours, reserve_bytes=reserve_bytes + added, ends_everywhere=True)


def exo_scores_bytes(config: KimiConfig, context: int, nodes: int) -> int:
    """Attention scores that exo's engine holds at the end of a full context: heads x chunk x context, two copies, bf16."""
    chunk = min(_PREFILL_STEP // min(_MOST_PARTS, max(nodes, 1)), context)
    return config.num_attention_heads * chunk * context * _SCORE_ELEMENT_BYTES * _SCORE_COPIES


def _alone(state: ClusterState, question: Question) -> Plan | None:
    free = {node.node_id: node.available_bytes for node in state.nodes if node.total_bytes}
    chosen = nodes_by_memory(question.model.total_bytes, free)
    if not chosen or question.layers < len(chosen):
        return None
    by_name = {machine.name: machine for machine in question.machines}
    machines = [by_name[state.names[node]] for node in chosen]
    counts = layers_by_memory(question.layers, [free[node] for node in chosen])
    return plan_of(PlacedSplit.given(question, counts, machines))


def _alone_line(alone: Plan | None, ours: Plan) -> str:
    if alone is None:
        return "refuses; all nodes together have too little free memory"
    where = ", ".join(f"{stage.machine} {stage.layers} layers" for stage in alone.stages)
    over = [
        f"{stage.machine} is {format_bytes(-stage.headroom_bytes)} over its limit"
        for stage in alone.stages
        if stage.headroom_bytes < 0
    ]
    if alone.ranges == ours.ranges and [s.machine for s in alone.stages] == [s.machine for s in ours.stages]:
        return f"{where} (the same, by the free memory of this second)"
    speed = f"{alone.prediction.decode_tokens_per_s:.1f} tokens/s to our {ours.prediction.decode_tokens_per_s:.1f}"
    return f"{where}; {'; '.join(over) if over else speed}"
