"""What inputs each module sees: the mean square of every input column, by one plain pass with one layer in memory at a time.

The file is what `exo-kimi convert --calibration` reads: safetensors, module path -> (in,) float32, or (E, in) for experts, each
by the tokens that chose it. The embedding has no inputs, and the halves of an absorbed kv_b_proj are not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.safetensors_io import StoredTensor, write_file
from exo_kimi.compress.layers import LayerWalk, attend, groups_of
from exo_kimi.compress.texts.encoding import Encoded, Encoder
from exo_kimi.compress.texts.reading import read_texts
from exo_kimi.errors import UsageError
from exo_kimi.models.kimi_k2 import DecoderLayer
from exo_kimi.runtime.stage.resident import give_back_memory

Say = Callable[[str], None]
MeanSquares = Mapping[str, NDArray[np.float32]]

_HEAD = "lm_head"
_KV_B, _LATENT = "self_attn.kv_b_proj", "self_attn.kv_a_layernorm"  # the first reads what the second gives


class ColumnSquares:
    """Sums of squares of the columns of rows: one sum, or one for each of E experts."""

    def __init__(self) -> None:
        self._sums: mx.array | None = None
        self._counts: mx.array | None = None

    @property
    def seen(self) -> bool:
        """Whether there was a row."""
        return self._sums is not None

    def add(self, x: mx.array) -> None:
        """Count rows (..., in)."""
        rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        self._count(mx.square(rows).sum(axis=0), mx.array(rows.shape[0], mx.float32))

    def add_experts(self, x: mx.array, experts: mx.array, total: int) -> None:
        """Count the inputs of pairs of a token and an expert.

        Args:
            x: (..., 1, in), which broadcasts to the pairs.
            experts: (...,) of `total`.
            total: E.
        """
        rows = mx.broadcast_to(x, (*experts.shape, 1, x.shape[-1])).reshape(-1, x.shape[-1]).astype(mx.float32)
        chosen = experts.reshape(-1)
        sums = mx.zeros((total, rows.shape[-1])).at[chosen].add(mx.square(rows))
        self._count(sums, mx.zeros((total, 1)).at[chosen].add(mx.ones((chosen.size, 1))))

    def means(self) -> NDArray[np.float32]:
        """(in,) or (E, in); an expert that no token chose, or that saw only zeros, has the mean of all."""
        if self._sums is None or self._counts is None:
            raise ValueError("nothing was seen")
        sums, counts = np.array(self._sums), np.array(self._counts)
        means = sums / np.maximum(counts, 1)
        if means.ndim == 2:
            known = means.any(-1, keepdims=True)
            means = np.where(known, means, sums.sum(0) / np.maximum(counts.sum(), 1))
        return np.asarray(means, np.float32)

    def _count(self, sums: mx.array, counts: mx.array) -> None:
        self._sums = sums if self._sums is None else self._sums + sums
        self._counts = counts if self._counts is None else self._counts + counts
        mx.eval(self._sums, self._counts)


class MeteredInput(nn.Module):  # type: ignore[misc]
    """A projection whose inputs are counted on their way in."""

    def __init__(self, inner: nn.Module, squares: ColumnSquares) -> None:
        super().__init__()
        self.inner, self._squares = inner, squares

    def __call__(self, x: mx.array, *experts: mx.array, **options: Any) -> mx.array:
        if experts:
            self._squares.add_experts(x, experts[0], self.inner.weight.shape[0])
        else:
            self._squares.add(x)
        out: mx.array = self.inner(x, *experts, **options)
        return out


class MeteredOutput(nn.Module):  # type: ignore[misc]
    """A norm whose outputs are counted: the inputs of a projection that is not called by itself."""

    def __init__(self, inner: nn.Module, squares: ColumnSquares) -> None:
        super().__init__()
        self.inner, self._squares = inner, squares

    def __call__(self, x: mx.array) -> mx.array:
        out: mx.array = self.inner(x)
        self._squares.add(out)
        return out


def measure_inputs(walk: LayerWalk, texts: Sequence[Encoded], *, say: Say = lambda _: None) -> MeanSquares:
    """Mean squares of the inputs' columns, by module path.

    Args:
        walk: over the checkpoint's layers.
        texts: as token ids.
        say: called with a line of progress after each layer.

    Raises:
        UsageError: there is no text.
        StageOutOfMemoryError: one layer does not fit into memory.
        CheckpointError: the checkpoint cannot be read.
    """
    if not texts:
        raise UsageError("no text to calibrate on", fix="give --text FILE")
    walk.check_room()
    groups = groups_of(texts)
    hidden: list[mx.array] = []
    found: dict[str, NDArray[np.float32]] = {}
    for layer in walk.numbers:
        model = walk.load(layer)
        if model.is_first:
            hidden = [model.embed(group.ids) for group in groups]
        decoder = model.layers[0]
        meters = _meter(decoder, walk.checkpoint, layer)
        for index, group in enumerate(groups):
            x = attend(decoder, hidden[index], group)
            hidden[index] = x + decoder.mlp(decoder.post_attention_layernorm(x))
            mx.eval(hidden[index])
        if model.is_last:
            meters[_HEAD] = ColumnSquares()
            for states in hidden:
                meters[_HEAD].add(model.model.norm(states))
        found.update({path: squares.means() for path, squares in meters.items() if squares.seen})
        del model, decoder, meters
        give_back_memory()
        say(f"layer {layer} of {walk.layers}")
    return found


def _meter(decoder: DecoderLayer, checkpoint: Checkpoint, layer: int) -> dict[str, ColumnSquares]:
    """Put a meter before every projection of a layer that can be packed; returns what they count, by path."""
    meters: dict[str, ColumnSquares] = {}
    prefix = f"model.layers.{layer}."
    for source in checkpoint.manifest(layer, layer + 1).sources:
        if not source.spec.quantizable or not source.spec.path.startswith(prefix):
            continue
        inside, squares = source.spec.path.removeprefix(prefix), ColumnSquares()
        *parents, name = (_LATENT if inside == _KV_B else inside).split(".")
        holder: Any = decoder
        for parent in parents:
            holder = holder[parent]
        if name not in holder:
            continue
        kind = MeteredOutput if inside == _KV_B else MeteredInput
        holder[name] = kind(holder[name], squares)
        meters[source.spec.path] = squares
    return meters


def write_inputs(
    directory: Path, files: Sequence[Path], output: Path, *, most_tokens: int | None, dtype: str | None, say: Say
) -> int:
    """Measure a checkpoint's inputs on the texts of files, and write them; returns the number of modules.

    Args:
        directory: the checkpoint.
        files: of the texts, see `read_texts`.
        output: INPUTS.safetensors.
        most_tokens: of all texts together; None for all.
        dtype: of activations; None as stored.
        say: called with a line of progress.

    Raises:
        UsageError: no text, or the output cannot be written.
        CheckpointError, StageOutOfMemoryError: see `measure_inputs`.
    """
    if not output.parent.is_dir():
        raise UsageError("the inputs cannot be written", found="no such directory", where=output.parent)
    texts = read_texts(files, Encoder.from_directory(directory), most_tokens=most_tokens)
    found = measure_inputs(LayerWalk(checkpoint=Checkpoint(directory), dtype=dtype), texts, say=say)
    part = output.with_name(f"{output.name}.part")
    try:
        write_file(part, {path: StoredTensor("F32", values) for path, values in found.items()})
        part.replace(output)
    except OSError as error:
        raise UsageError("the inputs cannot be written", found=error.strerror, where=output) from None
    return len(found)
