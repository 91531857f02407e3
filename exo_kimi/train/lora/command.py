"""`exo-kimi train lora`: rows of conversations to an adapter, in mlx-lm's format or PEFT's."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from exo_kimi.checkpoint.adapters.config import WEIGHTS_NAMES, AdapterConfig, AdapterFormat
from exo_kimi.checkpoint.adapters.writing import as_format, write_adapter
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.fingerprint import norms_fingerprint
from exo_kimi.compress.texts.encoding import Encoded, Encoder
from exo_kimi.compress.texts.reading import read_texts
from exo_kimi.errors import StageOutOfMemoryError, UsageError
from exo_kimi.models import ops
from exo_kimi.runtime.loading.loader import load_stage
from exo_kimi.runtime.stage.memory import free_memory
from exo_kimi.train.command import draw_curve
from exo_kimi.train.export import read_parameters
from exo_kimi.train.lora.mlx_gradients import MlxGradients
from exo_kimi.train.lora.numpy_gradients import NumpyGradients, why_not
from exo_kimi.train.lora.recipe import LoraRecipe
from exo_kimi.train.lora.trainer import AdapterGradients, LoraProgress, LoraTrainer
from exo_kimi.train.resumable import claim_output, training_bar
from exo_kimi.train.trainer import one_blas_thread
from exo_kimi.units import format_bytes

Backend = Literal["auto", "mlx", "numpy"]

_SAVE_EVERY = 100
_STATE, _CURVE = "state.npz", "loss.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraData:
    """Files of rows: what is trained on, and what is only measured."""

    train: Path
    valid: Path | None = None

    @classmethod
    def at(cls, path: Path) -> LoraData:
        """A file, or a directory with train.jsonl and maybe valid.jsonl, as mlx-lm has them.

        Raises:
            UsageError: the directory has no train.jsonl.
        """
        if not path.is_dir():
            return cls(train=path)
        train, valid = path / "train.jsonl", path / "valid.jsonl"
        if not train.exists():
            raise UsageError(
                "no train.jsonl in the directory", where=path, fix="give a .jsonl file, or mlx-lm's directory"
            )
        return cls(train=train, valid=valid if valid.exists() else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedLora:
    """Result of a training: where the adapter is, the SHA-256 of its weights, and losses in nats a token of the assistant."""

    directory: Path
    file: Path
    checksum: str
    rows: int
    parameters: int
    first_loss: float
    last_loss: float
    valid: tuple[str, str] | None

    def to_text(self) -> str:
        """For people."""
        lines = [
            f"adapter   {self.file}, {format_bytes(self.file.stat().st_size)}, {self.parameters:,} parameters",
            f"sha256    {self.checksum}",
            f"loss      {self.first_loss:.4f} in the first step, {self.last_loss:.4f} in the last, on {self.rows} rows",
        ]
        if self.valid is not None:
            lines.append(f"valid     {self.valid[0]} before, {self.valid[1]} after")
        return "\n".join(lines)


def train_lora(
    directory: Path,
    output: Path,
    data: LoraData,
    recipe: LoraRecipe,
    *,
    written_as: AdapterFormat = "mlx",
    backend: Backend = "auto",
    dtype: str | None = None,
) -> TrainedLora:
    """Train, or go on where an earlier run in this output stopped, and write the adapter into it.

    Args:
        directory: the base, any Kimi checkpoint that fits in memory, packed or not.
        output: made if missing.
        data: rows.
        recipe: of the adapter.
        written_as: whose format.
        backend: whose gradients; `auto` takes NumPy's where MLX has no GPU and the base is small enough.
        dtype: of activations in MLX; None keeps what the checkpoint has.

    Raises:
        CheckpointError, TokenizerError, TemplateError: the base cannot be read.
        UsageError: a row or an option that cannot be followed, or the output is of another training or cannot be written.
        StageOutOfMemoryError: the base does not fit.
    """
    checkpoint = Checkpoint(directory)
    modules = recipe.modules(checkpoint.config)
    encoder = Encoder.from_directory(directory)
    texts, valid = read_rows(data.train, encoder), read_rows(data.valid, encoder) if data.valid is not None else []
    fingerprint = norms_fingerprint(checkpoint.manifest())
    used = _used(backend, recipe, checkpoint)
    if used == "mlx":
        _check_room(checkpoint)
    config = AdapterConfig(
        format="mlx",
        fine_tune_type=recipe.fine_tune_type,
        rank=recipe.rank,
        scale=recipe.scale,
        dropout=recipe.dropout,
        keys=tuple(sorted({spec.path.removeprefix(f"model.layers.{spec.layer}.") for spec in modules})),
        num_layers=recipe.layers_of(checkpoint.config),
        base_name=directory.resolve().name,
        base_fingerprint=fingerprint,
    )
    config = as_format(config, written_as)
    try:
        claim_output(output, _stated(recipe, f"{fingerprint} by {used} {dtype}", texts), of="recipe, base or data")
        base: AdapterGradients
        if used == "numpy":
            base = NumpyGradients(recipe, checkpoint.config, read_parameters(directory))
        else:
            base = MlxGradients(recipe, load_stage(checkpoint.manifest(), dtype=dtype))
        trainer = LoraTrainer(recipe, base, texts)
        before = _mean(trainer.loss_of(valid)) if valid else None
        state = output / _STATE
        if state.exists():
            trainer.resume(state)
        if trainer.step > recipe.iters:
            raise UsageError(
                "the training in this directory went further",
                expected=f"--iters {trainer.step} or more",
                found=recipe.iters,
                where=output,
            )
        with one_blas_thread() if used == "numpy" else nullcontext():
            _run(trainer, output, lambda: write_adapter(output, config, trainer.modules(), checkpoint.config))
        if not draw_curve(trainer.losses, output / _CURVE, title=f"{recipe.fine_tune_type} of {config.base_name}"):
            print("no loss curve: matplotlib is in the extra `train`", file=sys.stderr)
    except OSError as error:
        raise UsageError("the training cannot be written", found=error.strerror, where=error.filename) from error
    file = output / WEIGHTS_NAMES[written_as]
    return TrainedLora(
        directory=output,
        file=file,
        checksum=hashlib.sha256(file.read_bytes()).hexdigest(),
        rows=len(texts),
        parameters=sum(value.size for value in trainer.parameters.values()),
        first_loss=trainer.losses[0],
        last_loss=trainer.losses[-1],
        valid=None if before is None else (before, _mean(trainer.loss_of(valid))),
    )


def read_rows(file: Path, encoder: Encoder) -> list[Encoded]:
    """The rows of a .jsonl file.

    Raises:
        UsageError: it cannot be read, a line is no row, or none has a token of an assistant.
    """
    if file.suffix != ".jsonl":
        raise UsageError(
            "rows are in a .jsonl file", expected='{"messages": [...]} on each line', found=file, where="--data"
        )
    texts = read_texts([file], encoder)
    if not texts:
        raise UsageError(
            "no row has a token to learn", expected="messages, the last of them an assistant's", where=file
        )
    return texts


def _stated(recipe: LoraRecipe, fingerprint: str, texts: Sequence[Encoded]) -> str:
    """What determines the steps: all but how many there are."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.ids.tobytes() + text.counted.tobytes())
    told = replace(recipe, iters=1)
    return f"{told} for {fingerprint} on {digest.hexdigest()}\n"


def _used(backend: Backend, recipe: LoraRecipe, checkpoint: Checkpoint) -> Literal["mlx", "numpy"]:
    if backend != "auto":
        return backend
    return "numpy" if ops.on_cpu() and why_not(recipe, checkpoint.config) is None else "mlx"


def _check_room(checkpoint: Checkpoint) -> None:
    needed, free = checkpoint.manifest().resident_bytes, free_memory().free_bytes
    if needed > free:
        raise StageOutOfMemoryError(
            "the base does not fit into this machine's memory now",
            expected=f"at most {format_bytes(free)}",
            found=format_bytes(needed),
            where=checkpoint.directory,
            fix="close other programs, or convert the base to fewer bits first: packed weights stay packed in training",
        )


def _mean(found: Sequence[tuple[float, int]]) -> str:
    """Mean loss a token with the half-width of its 95 % interval over texts."""
    tokens = sum(count for _, count in found)
    mean = sum(loss for loss, _ in found) / tokens
    spread = math.sqrt(sum((loss - mean * count) ** 2 for loss, count in found)) / tokens
    return f"{mean:.4f} ± {1.96 * spread:.4f}"


def _run(trainer: LoraTrainer, output: Path, write: Callable[[], None]) -> None:
    state = output / _STATE

    def save() -> None:
        trainer.save(state)
        write()

    with training_bar(steps=trainer.recipe.iters, step=trainer.step) as tell:

        def report(step: LoraProgress) -> None:
            tell(step.step, step.tokens, f"loss {step.loss:.4f}")
            if step.step % _SAVE_EVERY == 0:
                save()

        trainer.run(report)
        save()
