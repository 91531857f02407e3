"""`exo-kimi train grpo`: reinforce a small Kimi on its own tasks, and write it in native INT4."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.errors import UsageError
from exo_kimi.train.export import check_trainable
from exo_kimi.train.resumable import claim_output, training_bar
from exo_kimi.train.rl.curves import draw_curves
from exo_kimi.train.rl.recipe import GrpoRecipe
from exo_kimi.train.rl.trainer import GrpoProgress, GrpoTrainer

SAVE_EVERY = 5
"""Steps; rounded up to where the sampler gets new weights, for its old ones are not saved."""
_MOST_PARAMETERS = 50_000_000
_STATE, _CURVES, _SAMPLER, _NATIVE = "state.npz", "curves.png", "sampler", "int4"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reinforced:
    """Result of a training: the checkpoint, the SHA-256 of its weights, its curves, and how it went.

    Args:
        first, final: progress of the first step and of the last.
        groups: of all steps: mixed, all right, all wrong.
        process_s: processor seconds of all steps.
    """

    native: Path
    checksum: str
    curves: Path | None
    first: GrpoProgress
    final: GrpoProgress
    groups: tuple[int, int, int]
    process_s: float

    def to_text(self) -> str:
        """For people."""
        mixed, right, wrong = self.groups
        lines = [
            f"reward       {self.first.reward:.3f} in the first step, {self.final.reward:.3f} in the last",
            f"groups       {mixed} mixed; left out {right} all right, {wrong} all wrong",
            f"processor    {self.process_s:.0f} s",
            f"native INT4  {self.native}",
            f"sha256       {self.checksum}",
        ]
        lines.append(f"curves       {self.curves}" if self.curves else "no curves: matplotlib is in the extra `train`")
        return "\n".join(lines)


def train_grpo(directory: Path, output: Path, recipe: GrpoRecipe, *, stages: int = 1) -> Reinforced:
    """Train, or go on where an earlier run in this output stopped, and write `int4` and the curves into it.

    Args:
        directory: the checkpoint to begin from, small enough for NumPy; it stays the reference.
        output: made if missing.
        recipe: what to do.
        stages: of the engine that draws the rollouts.

    Raises:
        CheckpointError: the checkpoint cannot be read, or is of a family that is not trained.
        UsageError: it is too large, the output is of another training, or cannot be written.
        RuntimeFault: a stage failed.
    """
    checkpoint = Checkpoint(directory)
    check_trainable(checkpoint)
    _check_size(checkpoint)
    weights = _digest(directory)
    try:
        claim_output(output, f"{recipe} from {weights}\n", of="recipe or checkpoint")
        trainer = GrpoTrainer(recipe, directory, output / _SAMPLER, stages=stages)
        state = output / _STATE
        if state.exists():
            trainer.resume(state)
        _run(trainer, state)
        native = output / _NATIVE
        trainer.export(native)
        curves = output / _CURVES
        drawn = draw_curves(trainer.history, curves)
    except OSError as error:
        raise UsageError("the training cannot be written", found=error.strerror, where=error.filename) from error
    history = trainer.history
    return Reinforced(
        native=native,
        checksum=_digest(native),
        curves=curves if drawn else None,
        first=history[0],
        final=history[-1],
        groups=(
            sum(each.mixed for each in history),
            sum(each.all_right for each in history),
            sum(each.all_wrong for each in history),
        ),
        process_s=sum(each.process_s for each in history),
    )


def _run(trainer: GrpoTrainer, state: Path) -> None:
    sync = trainer.recipe.weight_sync_steps
    every = -(-SAVE_EVERY // sync) * sync
    with training_bar(steps=trainer.recipe.steps, step=trainer.step) as tell:

        def report(step: GrpoProgress) -> None:
            tell(
                step.step,
                step.tokens,
                f"reward {step.reward:.3f}, right {step.right:.2f}, {step.mixed} groups mixed, KL {step.kl:.4f}",
            )
            if step.step % every == 0:
                trainer.save(state)

        trainer.run(report)
        trainer.save(state)


def _digest(directory: Path) -> str:
    """SHA-256 of a checkpoint's weights, all files in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _check_size(checkpoint: Checkpoint) -> None:
    size = sum(source.spec.parameters for source in checkpoint.manifest().sources)
    if size > _MOST_PARAMETERS:
        raise UsageError(
            "this Kimi is too large to reinforce here",
            expected=f"at most {_MOST_PARAMETERS:,} parameters, as of `exo-kimi train tiny`",
            found=f"{size:,}",
            where=checkpoint.directory,
            fix="docs/post-training.md says what K2 would take",
        )
