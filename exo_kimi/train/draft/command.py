"""`exo-kimi train draft`: train a head for a small Kimi, and write it in the published format."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

from exo_kimi.arch.draft_config import DraftConfig
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.fingerprint import norms_fingerprint
from exo_kimi.checkpoint.tiny.draft import write_draft
from exo_kimi.compress.texts.encoding import Encoder
from exo_kimi.errors import UsageError
from exo_kimi.train.draft.acceptance import AcceptanceReport, measure_acceptance, read_target
from exo_kimi.train.draft.recipe import DraftRecipe
from exo_kimi.train.draft.trainer import DraftProgress, DraftTrainer, common_tokens
from exo_kimi.train.export import check_trainable
from exo_kimi.train.resumable import claim_output, training_bar
from exo_kimi.units import format_bytes

_SAVE_EVERY = 100
_MOST_PARAMETERS = 50_000_000
_STATE = "state.npz"
_BITS = 4
_QUESTIONS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedDraft:
    """Result of a training: the head's directories, the SHA-256 of the packed weights, and its acceptance at 4 bits."""

    plain: Path
    packed: Path
    checksum: str
    acceptance: AcceptanceReport

    def to_text(self) -> str:
        """For people."""
        size = format_bytes((self.packed / "model.safetensors").stat().st_size)
        where = f"bf16         {self.plain}\n{_BITS}-bit        {self.packed}, {size}\nsha256       {self.checksum}"
        return f"{self.acceptance.to_text()}\n\n{where}"


def train_draft(directory: Path, output: Path, recipe: DraftRecipe) -> TrainedDraft:
    """Train, or go on where an earlier run in this output stopped, and write `bf16` and `mlx-4bit` into it.

    Args:
        directory: the target, a Kimi small enough for NumPy.
        output: made if missing.
        recipe: how long.

    Raises:
        CheckpointError: the target cannot be read.
        UsageError: the target is too large, the output is of another training, or cannot be written.
    """
    checkpoint = Checkpoint(directory)
    check_trainable(checkpoint)
    fingerprint = norms_fingerprint(checkpoint.manifest())
    _check_size(checkpoint)
    raw = recipe.raw_config(checkpoint.config, fingerprint)
    config = DraftConfig.from_dict(raw, where="the recipe")
    encoder = Encoder.from_directory(directory)
    try:
        claim_output(output, f"{recipe} for {fingerprint}\n", of="recipe or target")
        ids = common_tokens(encoder, config.draft_vocab_size, recipe.seed)
        trainer = DraftTrainer(recipe, config, read_target(checkpoint, config), encoder, ids)
        state = output / _STATE
        if state.exists():
            trainer.resume(state)
        _run(trainer, state)
        chosen = ids if config.draft_vocab_size < config.vocab_size else None
        plain, packed = output / "bf16", output / f"mlx-{_BITS}bit"
        write_draft(plain, raw, trainer.parameters, chosen)
        write_draft(packed, raw, trainer.parameters, chosen, bits=_BITS)
    except OSError as error:
        raise UsageError("the training cannot be written", found=error.strerror, where=error.filename) from error
    print("counting what it guesses on held-out questions", file=sys.stderr)
    acceptance = measure_acceptance(directory, packed, count=_QUESTIONS, seed=1)
    digest = hashlib.sha256((packed / "model.safetensors").read_bytes()).hexdigest()
    return TrainedDraft(plain=plain, packed=packed, checksum=digest, acceptance=acceptance)


def _check_size(checkpoint: Checkpoint) -> None:
    size = sum(source.spec.parameters for source in checkpoint.manifest().sources)
    if size > _MOST_PARAMETERS:
        raise UsageError(
            "this Kimi is too large to train a head for here",
            expected=f"at most {_MOST_PARAMETERS:,} parameters, as of `exo-kimi train tiny`",
            found=f"{size:,}",
            where=checkpoint.directory,
            fix="published heads are trained with SpecForge on GPUs; `exo-kimi serve --draft` takes those",
        )


def _run(trainer: DraftTrainer, state: Path) -> None:
    with training_bar(steps=trainer.recipe.steps, step=trainer.step) as tell:

        def report(step: DraftProgress) -> None:
            right = " ".join(f"{share:.2f}" for share in step.right)
            tell(step.step, step.tokens, f"loss {step.loss:.3f}, right {right}")
            if step.step % _SAVE_EVERY == 0:
                trainer.save(state)

        trainer.run(report)
        trainer.save(state)
