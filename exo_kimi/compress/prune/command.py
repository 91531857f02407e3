"""`exo-kimi prune`: the words of the command line to a plan, and the plan to a checkpoint, or to a plan file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.compress.calibrate.file import read_measured
from exo_kimi.compress.calibrate.scores import Criterion
from exo_kimi.compress.prune.plan import PrunePlan, read_plan
from exo_kimi.compress.prune.profile import check_profile, read_verdict
from exo_kimi.compress.prune.prune import PruneWish, make_plan, pruning_job, write_pruned
from exo_kimi.compress.prune.tensors import guessing_entries
from exo_kimi.errors import UnsupportedModelError, UsageError
from exo_kimi.units import format_bytes

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneOptions:
    """What the command line says, see `exo-kimi prune --help`."""

    keep: int | Path | None = None
    scores: Path | None = None
    criterion: Criterion = "leave-one-out"
    budgeted: bool = False
    drop_layers: tuple[int, ...] | int = ()
    protect: bool = True
    seed: int = 0
    domain: str = ""
    report: Path | None = None
    research: bool = False
    dry_run: bool = False


def prune(directory: Path, output: Path | None, options: PruneOptions, *, plan_file: bool, say: Say) -> PrunePlan:
    """Plan, and write unless only the plan or its figures are wanted.

    Args:
        directory: the checkpoint.
        output: where to write; None for no checkpoint.
        options: how.
        plan_file: whether the caller will write the plan: then nothing needs to speak for it yet.
        say: called with a line for people.

    Raises:
        UsageError: what was asked for cannot be, or nothing speaks for it.
        CheckpointError, MachineError: see `write_pruned`.
        UnsupportedModelError: a family whose experts are not dropped yet.
    """
    checkpoint = Checkpoint(directory)
    if checkpoint.config.has_states:
        raise UnsupportedModelError(
            "experts are dropped of a Kimi K2 alone",
            found=f"model_type {checkpoint.config.model_type}",
            where=directory,
            fix="`exo-kimi convert` makes it smaller: --recipe uniform-4",
        )
    plan = _plan(checkpoint, options, say)
    job = pruning_job(checkpoint, plan, output or directory)
    total = checkpoint.index.disk_bytes
    left = job.weight_bytes + sum(path.stat().st_size for path in job.copied if path.suffix == ".safetensors")
    say(
        f"{plan.keep_text} of {plan.experts} experts stay ({plan.share:.0%}); {format_bytes(total)} become {format_bytes(left)}"
    )
    if not plan.is_uniform:
        say("layers keep different numbers of experts: exo-kimi serves that, mlx-lm and exo's own engine do not")
    if plan.dropped_layers:
        say(f"layers {', '.join(map(str, plan.dropped_layers))} go: {len(plan.kept_layers())} of {plan.layers} stay")
    if guesses := guessing_entries(checkpoint.index, plan):
        size = format_bytes(sum(entry.nbytes for entry in guesses))
        say(f"{len(guesses):,} tensors of the layers that guess further tokens (MTP) are left out, {size}")
    if options.dry_run or (output is None and plan_file):
        return plan
    if output is None:
        raise UsageError("nothing to write", expected="OUT, -o PLAN.json or --dry-run")
    verdict = None if options.report is None else read_verdict(options.report)
    check_profile(plan, research=options.research, domain=plan.domain, verdict=verdict)
    written = write_pruned(checkpoint, plan, output, notes=() if verdict is None else verdict.notes)
    Checkpoint(output).manifest()  # what was written is a checkpoint
    say(f"{output} was written already" if written.unchanged else f"a pruned checkpoint is in {output}")
    return plan


def _plan(checkpoint: Checkpoint, options: PruneOptions, say: Say) -> PrunePlan:
    if isinstance(options.keep, Path):
        plan = read_plan(options.keep)
        plan.check(checkpoint.config)
    else:
        measured = None if options.scores is None else read_measured(options.scores)
        wish = PruneWish(
            keep=options.keep,
            measured=measured,
            criterion=options.criterion,
            budgeted=options.budgeted,
            drop_layers=options.drop_layers,
            protect=options.protect,
            seed=options.seed,
        )
        plan = make_plan(checkpoint, wish)
    if plan.fingerprint and plan.fingerprint != checkpoint.fingerprint:
        say(
            "the scores are of other files with this architecture: right only if they are the same model in another form"
        )
    return replace(plan, domain=options.domain) if options.domain else plan
