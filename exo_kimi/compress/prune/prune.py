"""`exo-kimi prune`: from scores to a plan, and from a plan to a smaller checkpoint.

plan = make_plan(checkpoint, wish)
written = write_pruned(checkpoint, plan, OUT)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from exo_kimi.arch.config import KimiConfig
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.shards import INDEX_NAME
from exo_kimi.checkpoint.text_files import CONFIG_NAME, read_text
from exo_kimi.compress.calibrate.measures import Measured
from exo_kimi.compress.calibrate.scores import Criterion, saliencies, super_experts
from exo_kimi.compress.output.job import OutputJob, files_to_copy
from exo_kimi.compress.output.shards import index_text
from exo_kimi.compress.output.writer import CheckpointWriter, Written
from exo_kimi.compress.prune.card import CARD_NAME, card_text
from exo_kimi.compress.prune.choose import keep_budgeted, keep_uniform
from exo_kimi.compress.prune.config import pruned_config
from exo_kimi.compress.prune.plan import PLAN_NAME, PrunePlan, check_count, everything
from exo_kimi.compress.prune.tensors import pruned_files
from exo_kimi.compress.ranges import RangeReader
from exo_kimi.errors import UsageError

DEFAULT_SHARE = 0.75
"""288 of 384: a quarter of the experts goes."""

LEAST_SHARE = 0.5
"""192 of 384: for one domain, behind gates; below it is research."""

VERSION = 1  # of what is written for the same plan

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneWish:
    """What a user asks for.

    Args:
        keep: experts of a layer that stay; None for three quarters.
        measured: scores; None where chance decides.
        criterion: what experts are ranked by.
        budgeted: divide the experts over the layers by what they are worth; exo-kimi alone serves what comes of it.
        drop_layers: layers to take out, or how many of those with the least block influence.
        protect: keep super experts whatever they are worth.
        seed: of chance.
    """

    keep: int | None = None
    measured: Measured | None = None
    criterion: Criterion = "leave-one-out"
    budgeted: bool = False
    drop_layers: tuple[int, ...] | int = ()
    protect: bool = True
    seed: int = 0


def default_keep(config: KimiConfig) -> int:
    """Three quarters of the experts, as many in each of the router's groups."""
    return int(config.n_routed_experts * DEFAULT_SHARE) // config.n_group * config.n_group


def make_plan(checkpoint: Checkpoint, wish: PruneWish) -> PrunePlan:
    """Choose what stays.

    Raises:
        UsageError: no scores, scores of another model, or a number of experts or layers that cannot be.
        CheckpointError: the checkpoint cannot be read.
    """
    config = checkpoint.config
    keep = default_keep(config) if wish.keep is None else wish.keep
    check_count(config, keep)
    full = everything(config)
    layers = _dropped(wish, config)
    if keep == config.n_routed_experts and not layers:
        return full
    worth = _worth(wish, config)
    protected = super_experts(wish.measured) if wish.protect and wish.measured is not None else {}
    if wish.budgeted:
        least = max(config.num_experts_per_tok, -(-config.num_experts_per_tok * config.n_group // config.topk_group))
        staying = {layer: values for layer, values in worth.items() if layer not in layers}
        divided = keep_budgeted(staying, keep, least=least, groups=config.n_group, protected=protected)
        kept = {**full.kept, **divided}
    else:
        kept = keep_uniform(worth, keep, groups=config.n_group, protected=protected)
    measured = wish.measured
    plan = replace(
        full,
        kept=kept,
        dropped_layers=layers,
        criterion=wish.criterion if keep < config.n_routed_experts else "",
        domain="" if measured is None else measured.domain,
        source=_source(wish),
        fingerprint="" if measured is None else measured.fingerprint,
    )
    plan.check(config)
    return plan


def write_pruned(
    checkpoint: Checkpoint,
    plan: PrunePlan,
    output: Path,
    *,
    notes: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> Written:
    """Write what stays by copying bytes; a run that was stopped goes on, and one that was finished changes nothing.

    Args:
        checkpoint: in any layout; every tensor of it must be known.
        plan: what stays.
        output: new, empty, or of a run with the same plan.
        notes: sentences for the card: what it cost, as measured.
        progress: called with the bytes of each piece that is written.

    Raises:
        UsageError: the plan cannot be written, or the output is something else.
        CheckpointError: the checkpoint is damaged or changed meanwhile.
        MachineError: the disk is full; what is done stays.
    """
    plan.check(checkpoint.config)
    checkpoint.manifest()  # nothing is cut that does not fit
    job = pruning_job(checkpoint, plan, output, notes=notes)
    files = {file.shard.file: file for file in pruned_files(checkpoint.index, plan)}
    with RangeReader(checkpoint.directory) as reader, CheckpointWriter(job, progress) as writer:
        for shard in writer.missing():
            with writer.open(shard) as part:
                for tensor in files[shard.file].kept:
                    tensor.copy(reader, part)
        return writer.finish()


def pruning_job(checkpoint: Checkpoint, plan: PrunePlan, output: Path, *, notes: tuple[str, ...] = ()) -> OutputJob:
    """The output as it will be, from the headers alone."""
    directory = checkpoint.directory
    files = pruned_files(checkpoint.index, plan)
    copied = [*files_to_copy(directory), *(file.path for file in files if file.is_as_before)]
    texts: dict[str, str] = {}
    if plan.changes_nothing:
        copied += [path for name in (INDEX_NAME, CARD_NAME) if (path := directory / name).is_file()]
        texts[CONFIG_NAME] = read_text(directory / CONFIG_NAME)
    else:
        copied = [path for path in copied if path.name != PLAN_NAME]
        if len(files) > 1 or (directory / INDEX_NAME).is_file():
            texts[INDEX_NAME] = index_text(file.shard for file in files)
        texts[PLAN_NAME] = plan.to_json()
        texts[CARD_NAME] = card_text(checkpoint, plan, notes)
        texts[CONFIG_NAME] = json.dumps(pruned_config(checkpoint.raw_config, plan), indent=2, ensure_ascii=False) + "\n"
    return OutputJob(
        directory=output,
        kind="prune",
        meaning={"version": VERSION, "source": checkpoint.fingerprint, "plan": plan.hash},
        shards=tuple(file.shard for file in files if not file.is_as_before),
        texts=texts,
        copied=tuple(copied),
    )


def _worth(wish: PruneWish, config: KimiConfig) -> dict[int, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
    if wish.measured is None:
        if wish.criterion != "random":
            raise UsageError(
                f"ranking by {wish.criterion} needs scores",
                expected="--scores SCORES.json",
                fix="`exo-kimi calibrate DIR --text FILE -o SCORES.json` makes them",
            )
        return {
            layer: np.random.default_rng([wish.seed, layer]).random(config.n_routed_experts)
            for layer in range(config.num_hidden_layers)
            if config.is_moe(layer)
        }
    check_scores(wish.measured, config)
    if wish.budgeted and wish.criterion != "leave-one-out":
        raise UsageError(
            "--budgeted weighs layers against each other, which only leave-one-out can", found=wish.criterion
        )
    return saliencies(wish.measured, wish.criterion, seed=wish.seed)


def check_scores(measured: Measured, config: KimiConfig) -> None:
    """Refuse scores of another architecture.

    Raises:
        UsageError: they are.
    """
    wanted = (
        [config.n_routed_experts if config.is_moe(layer) else 0 for layer in range(config.num_hidden_layers)],
        config.num_experts_per_tok,
    )
    found = [layer.experts for layer in measured.layers], measured.chosen
    if wanted != found:
        raise UsageError(
            "the scores are of another model",
            expected=f"{len(wanted[0])} layers of {max(wanted[0])} experts, {wanted[1]} a token",
            found=f"{len(found[0])} layers of {max(found[0], default=0)}, {found[1]}",
            where="--scores",
        )


def _dropped(wish: PruneWish, config: KimiConfig) -> tuple[int, ...]:
    if not isinstance(wish.drop_layers, int):
        return tuple(sorted(set(wish.drop_layers)))
    if wish.measured is None:
        raise UsageError("which layers matter least is in the scores", expected="--scores SCORES.json")
    check_scores(wish.measured, config)
    free = range(max(1, config.first_k_dense_replace), config.num_hidden_layers - 1)
    ranked = sorted(free, key=lambda layer: wish.measured.layers[layer].block_influence if wish.measured else 0.0)
    return tuple(sorted(ranked[: wish.drop_layers]))


def _source(wish: PruneWish) -> str:
    if wish.measured is None:
        return f"by chance, seed {wish.seed}"
    how = "divided over the layers" if wish.budgeted else "as many in every layer"
    guard = "super experts protected" if wish.protect else "super experts not protected"
    return f"{how}, {guard}; measured on {wish.measured.texts} texts, {wish.measured.tokens} tokens"
