"""`exo-kimi plan`: plain arguments to a question, and its answer; the command line only prints and saves.

answer = plan_answer(directory=DIR, cluster="m3-ultra-512, m2-ultra-192", context=40960, explained=True)
print(answer.text); answer.plan.save("PLAN.json"); Path("plan.svg").write_text(answer.svg)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from exo_kimi.arch.geometry import check_quantizable
from exo_kimi.checkpoint.adapters.config import read_adapter_config
from exo_kimi.checkpoint.adapters.manifest import resolve_for
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.vision import chosen_tower
from exo_kimi.errors import UsageError
from exo_kimi.planner.answer import Answer, answer, fitting
from exo_kimi.planner.machines.cluster import read_cluster
from exo_kimi.planner.question import Question
from exo_kimi.planner.search.cost import PlacedSplit
from exo_kimi.planner.search.search import best_split
from exo_kimi.planner.streaming import HitCurve, Streaming, default_curve, read_curve
from exo_kimi.planner.weights.bytes import ModelBytes, bytes_of_manifest, bytes_of_recipe
from exo_kimi.planner.weights.catalog import model_names, published_model
from exo_kimi.planner.weights.draft import draft_bytes
from exo_kimi.planner.weights.measured import read_report
from exo_kimi.planner.weights.recipes import load_recipe
from exo_kimi.planner.workload import OBJECTIVES, RESERVE_BYTES, Objective, make_workload

CHUNKS = (1024, 2048, 4096)
WORTH_A_CHUNK = 0.01  # of the objective: other streams wait longer behind a long chunk


def plan_answer(
    *,
    cluster: str | Path,
    directory: str | Path | None = None,
    model: str | None = None,
    recipe: str | Path | None = None,
    context: int | None = None,
    concurrency: int | None = None,
    objective: Objective = "request",
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    prefill_chunk: int | None = None,
    reserve_bytes: int = RESERVE_BYTES,
    raise_limits: bool = False,
    ends_everywhere: bool = False,
    kv_bits: int | None = None,
    split: str | Sequence[int] | None = None,
    force: bool = False,
    explained: bool = False,
    reports: Sequence[Path] = (),
    fit: bool = False,
    vision: Path | None = None,
    no_vision: bool = False,
    stream: bool = False,
    ssd_bytes_per_s: float | None = None,
    hits: Path | HitCurve | None = None,
    draft: str | Path | None = None,
    adapter: Sequence[Path] = (),
) -> Answer:
    """The best plan for a checkpoint directory, or for a published model in a recipe.

    Args:
        cluster: an inline list such as `m3-ultra-512, m2-ultra-192`, or a cluster.toml.
        directory: a checkpoint; its headers give the bytes.
        model: a published model's name, instead of a directory.
        recipe: name or file; the model as published when not given.
        context: tokens of one sequence; 40,960 when not given.
        concurrency: sequences at once; 1, but one per machine for `throughput`, when not given.
        objective: what is minimised.
        prompt_tokens: of the request that is timed; 4,096 when not given.
        new_tokens: that it generates; 512 when not given.
        prefill_chunk: prompt tokens of one step at most, as `serve --prefill-chunk`; 512 when not given.
        reserve_bytes: kept free on every machine.
        raise_limits: count on raised wired limits; the plan then holds the sysctl lines.
        ends_everywhere: every stage holds embedding and head, as exo's own engine does.
        kv_bits: of the cache, as `serve --kv-bits`; bf16 when not given.
        split: judge these layer counts, over the machines by memory, the largest first, instead of searching.
        force: take that split even where a machine is over its limit.
        explained: add the explanation to the text.
        reports: of `exo-kimi compare --json`: smaller forms of this model and what they cost, for the explanation and `fit`.
        fit: plan the best form that fits: as it is, a measured one, or a recipe.
        vision: where the tower for pictures is, if not beside the layers; with them it is counted without being named.
        no_vision: count none.
        stream: machines whose layers do not fit may read experts from disk.
        ssd_bytes_per_s: of every disk that was neither measured nor set in the cluster file.
        hits: hit rates, or their file, as `exo-kimi trace replay -o` writes it; what others have published when not given.
        draft: a head's directory or a published one's name: its bytes are counted, and its speeds by acceptance shown.
        adapter: directories of adapters to serve beside it, whose bytes are counted.

    Raises:
        UsageError: arguments that contradict each other or cannot be read, or a split that cannot be.
        CheckpointError: the directory is not a checkpoint that can be served.
        PlanInfeasibleError: nothing fits, or the given split does not.
    """
    if objective not in OBJECTIVES:
        raise UsageError("unknown objective", expected=", ".join(OBJECTIVES), found=objective, where="--objective")
    weights = model_bytes(directory=directory, model=model, recipe=recipe, vision=vision, no_vision=no_vision)
    if kv_bits is not None:
        check_quantizable(weights.config)
        weights = replace(weights, kv_bits=kv_bits)
    if adapter and ends_everywhere:
        raise UsageError("exo's own engine serves no adapters", found="--adapter", fix="plan for exo-kimi's engine")
    weights = weights.with_adapters(resolve_for(each, read_adapter_config(each), weights.config) for each in adapter)
    machines = read_cluster(cluster)
    if ssd_bytes_per_s is not None:
        machines = machines.with_ssd(ssd_bytes_per_s)
    if concurrency is None:
        concurrency = len(machines.machines) if objective == "throughput" else 1
    workload = make_workload(
        weights.config,
        context=context,
        concurrency=concurrency,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        reserve_bytes=reserve_bytes,
        ends_everywhere=ends_everywhere,
        **({} if prefill_chunk is None else {"prefill_chunk": prefill_chunk}),
    )
    if draft is not None and ends_everywhere:
        raise UsageError("exo's own engine drafts nothing", found="--draft", fix="plan for exo-kimi's engine")
    head = None if draft is None else draft_bytes(draft, weights.config)
    question = Question(model=weights, cluster=machines, workload=workload, objective=objective, draft=head)
    if raise_limits:
        question = question.with_raised_limits()
    if stream:
        curve = default_curve() if hits is None else hits if isinstance(hits, HitCurve) else read_curve(hits)
        question = replace(question, streaming=_streaming(question, curve))
        if prefill_chunk is None:
            question = with_best_chunk(question, split)
    elif hits is not None or ssd_bytes_per_s is not None:
        raise UsageError("--hits and --ssd say how experts are streamed", fix="give --stream too, or leave them out")
    measured = tuple(read_report(path, weights) for path in reports)
    if fit:
        if split is not None or stream:
            raise UsageError("--fit searches", expected="no --split and no --stream", fix="leave them out")
        return fitting(question, measured, explained=explained)
    if split is None:
        return replace(answer(question, explained=explained), measured=measured)
    return Answer.given(question, split, force=force)


def with_best_chunk(question: Question, split: str | Sequence[int] | None = None) -> Question:
    """The question with the prefill chunk that its objective likes best, where experts are streamed.

    Each chunk reads nearly all of them, so that longer ones read less, and need more scratch.

    Args:
        question: with the chunk that it has if nothing is streamed.
        split: layer counts that were given.
    """

    def made(asked: Question) -> PlacedSplit | None:
        if split is None:
            return best_split(asked)
        return PlacedSplit.given(asked, split, asked.machines_in_order)

    best = made(question)
    if best is None or not best.streams:
        return question
    for chunk in CHUNKS:
        other = made(question.with_workload(prefill_chunk=chunk))
        if other is not None and other.objective_s < best.objective_s * (1 - WORTH_A_CHUNK):
            best = other
    return best.question


def _streaming(question: Question, curve: HitCurve) -> Streaming:
    """What the question's machines may stream.

    Raises:
        UsageError: there are no routed experts, or they lie on disk in a form that cannot be streamed.
    """
    if question.workload.ends_everywhere:
        raise UsageError("exo's own engine holds every expert", found="--stream", fix="plan for exo-kimi's engine")
    if not any(question.model.expert_bytes):
        raise UsageError("a model without routed experts has nothing to stream", where="--stream", fix="leave it out")
    return Streaming(curve=curve)


def model_bytes(
    *,
    directory: str | Path | None = None,
    model: str | None = None,
    recipe: str | Path | None = None,
    vision: Path | None = None,
    no_vision: bool = False,
) -> ModelBytes:
    """Bytes from a directory's headers or from a published model and a recipe, those of a vision tower among them.

    Raises:
        UsageError: neither or both, or a recipe for a directory.
        CheckpointError: the directory is not a checkpoint that can be served.
    """
    if (directory is None) == (model is None):
        names = ", ".join(model_names())
        raise UsageError("give a checkpoint directory or --model", expected=f"DIR, or --model of {names}")
    if directory is not None:
        if recipe is not None:
            raise UsageError("--recipe is for --model: a directory's headers say what it holds", found=str(recipe))
        checkpoint = Checkpoint(directory)
        tower = chosen_tower(checkpoint.index, vision, no_vision=no_vision)
        return bytes_of_manifest(checkpoint.manifest()).with_tower(tower)
    if vision is not None:
        raise UsageError("--vision is for DIR: the tower of a published model is counted without it", where="--vision")
    published = published_model(str(model))
    found = bytes_of_recipe(published.config, load_recipe(recipe or published.default_recipe), name=published.name)
    if not no_vision and published.tower_bytes:
        return replace(found, vision_bytes=published.tower_bytes)
    if no_vision or published.vision is None:
        return found
    return replace(found, vision_bytes=published.vision.published_bytes)
