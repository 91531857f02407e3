"""`exo-kimi train tiny`: learn the vocabulary, train, export."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exo_kimi.compress.texts.encoding import Encoder
from exo_kimi.errors import UsageError
from exo_kimi.train.data.bpe import train_ranks
from exo_kimi.train.export import write_checkpoint, write_vocabulary
from exo_kimi.train.recipe import TrainingRecipe
from exo_kimi.train.resumable import training_bar
from exo_kimi.train.trainer import Trainer, TrainingProgress

_SAVE_EVERY = 100
_MEAN_STEPS = 20  # of the running mean in the picture
_STATE, _VOCABULARY, _CURVE = "state.npz", "vocabulary", "loss.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """Result of a training: the checkpoint directories, and the SHA-256 of the native weights."""

    native: Path
    plain: Path
    checksum: str

    def to_text(self) -> str:
        """For people."""
        return f"native INT4  {self.native}\nbf16         {self.plain}\nsha256       {self.checksum}"


def train_tiny(directory: Path, recipe: TrainingRecipe) -> Trained:
    """Train, or go on where an earlier run in this directory stopped, and export `int4` and `bf16` into it.

    Raises:
        UsageError: the directory is of another recipe, or cannot be written.
    """
    try:
        trainer = _open(directory, recipe)
        _run(trainer, directory / _STATE)
        parameters = trainer.parameters
        native, plain = directory / "int4", directory / "bf16"
        write_checkpoint(native, directory / _VOCABULARY, parameters, layout="int4")
        write_checkpoint(plain, directory / _VOCABULARY, parameters, layout="bf16")
        if not draw_curve(trainer.losses, directory / _CURVE):
            print("no loss curve: matplotlib is in the extra `train`", file=sys.stderr)
    except OSError as error:
        raise UsageError("the training cannot be written", found=error.strerror, where=error.filename) from error
    digest = hashlib.sha256((native / "model.safetensors").read_bytes()).hexdigest()
    return Trained(native=native, plain=plain, checksum=digest)


def _open(directory: Path, recipe: TrainingRecipe) -> Trainer:
    vocabulary, stated = directory / _VOCABULARY, directory / "recipe.txt"
    if stated.exists() and stated.read_text(encoding="utf-8") != f"{recipe}\n":
        raise UsageError(
            "the directory holds a training of another recipe",
            expected=recipe,
            found=stated.read_text(encoding="utf-8").strip(),
            where=stated,
            fix="give another directory, or the same options",
        )
    if not stated.exists():
        print("learning the vocabulary", file=sys.stderr)
        write_vocabulary(vocabulary, recipe.raw_config, train_ranks(recipe.seed, recipe.ranks))
        stated.write_text(f"{recipe}\n", encoding="utf-8")
    trainer = Trainer(recipe, Encoder.from_directory(vocabulary))
    if (directory / _STATE).exists():
        trainer.resume(directory / _STATE)
    return trainer


def _run(trainer: Trainer, state: Path) -> None:
    with training_bar(steps=trainer.recipe.steps, step=trainer.step) as tell:

        def report(step: TrainingProgress) -> None:
            tell(step.step, step.tokens, f"loss {step.loss:.3f}")
            if step.step % _SAVE_EVERY == 0:
                trainer.save(state)

        trainer.run(report)
        trainer.save(state)


def draw_curve(losses: Sequence[float], path: Path, *, title: str = "Training of the tiny Kimi K2") -> bool:
    """Write a PNG of the loss per step, with its running mean; False when matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4.5), dpi=120)
    axes = figure.subplots()
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, linewidth=0.6, alpha=0.35, label="loss of a step")
    if len(losses) > _MEAN_STEPS:
        mean = np.convolve(losses, np.ones(_MEAN_STEPS) / _MEAN_STEPS, mode="valid")
        axes.plot(steps[_MEAN_STEPS - 1 :], mean, linewidth=1.4, label=f"mean of {_MEAN_STEPS}")
    axes.set(xlabel="step", ylabel="nats a token of the assistant", yscale="log", title=title)
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    return True
