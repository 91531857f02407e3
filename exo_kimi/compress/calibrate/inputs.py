"""What inputs each module sees, and what its errors do: by one pass with one layer in memory at a time.

The file is what `exo-kimi convert --calibration` reads: safetensors, module path -> (in,) float32, or (E, in) for experts, each
by the tokens that chose it. The embedding has no inputs, and the halves of an absorbed kv_b_proj are not measured.

Its metadata has the worth of each module, `{"worth": {path: number}}` as JSON: what a squared relative error of its output makes
of the final states, relative and squared. Errors that depend on the input, as those of weights do, are put into each module in
turn, and pass through the rest of its layer; from there on to the end they are taken to stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.safetensors_io import StoredTensor, write_file
from exo_kimi.compress.layers import LayerWalk, TokenGroup, attend, groups_of
from exo_kimi.compress.texts.encoding import Encoded, Encoder
from exo_kimi.compress.texts.reading import read_texts
from exo_kimi.errors import UsageError
from exo_kimi.models.kimi_k2 import DecoderLayer
from exo_kimi.runtime.stage.resident import give_back_memory

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class InputStatistics:
    """Of modules, by path: mean squares of their inputs' columns, (in,) or (E, in), and the worth of their errors."""

    columns: Mapping[str, NDArray[np.float32]]
    worth: Mapping[str, float]


_HEAD, _EMBEDDING = "lm_head", "model.embed_tokens"
_LATENT = "self_attn.kv_a_layernorm"
_KV_B = ("self_attn.kv_b_proj", "self_attn.embed_q", "self_attn.unembed_out")  # they read what the latent's norm gives
_NOISE = 0.2  # relative error of a module's output, as of 3 bits


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


class NoisyOutput(nn.Module):  # type: ignore[misc]
    """A module whose outputs have an error of fixed relative size, linear in its inputs; a norm's in its outputs."""

    def __init__(self, inner: nn.Module, *, of_outputs: bool) -> None:
        super().__init__()
        self.inner, self._of_outputs = inner, of_outputs

    def __call__(self, x: mx.array, *experts: mx.array, **options: Any) -> mx.array:
        y: mx.array = self.inner(x, *experts, **options)
        return y + _error(y if self._of_outputs else x, y)


def _error(cause: mx.array, y: mx.array) -> mx.array:
    """Of y (..., out), by random weights of a cause (..., in)."""
    weights = mx.random.normal((y.shape[-1], cause.shape[-1]), key=mx.random.key(0))
    error = cause.astype(mx.float32) @ weights.T
    length = mx.linalg.norm(error, axis=-1, keepdims=True)
    wanted = _NOISE * mx.linalg.norm(y.astype(mx.float32), axis=-1, keepdims=True)
    scaled: mx.array = error * wanted / mx.maximum(length, 1e-20)
    return scaled.astype(y.dtype)


def measure_inputs(walk: LayerWalk, texts: Sequence[Encoded], *, say: Say = lambda _: None) -> InputStatistics:
    """Mean squares of the inputs' columns and worth of errors, by module path.

    Worth is measured on the first texts, at most `GROUP_TOKENS` tokens of them unless one is longer.

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
    errors: dict[str, float] = {}
    for layer in walk.numbers:
        model = walk.load(layer)
        if model.is_first:
            hidden = [model.embed(group.ids) for group in groups]
        decoder, before = model.layers[0], hidden[0]
        places = _places(decoder, walk.checkpoint, layer)
        meters = {path: ColumnSquares() for path, (inside, _) in places.items() if inside not in _KV_B[1:]}
        with _replaced(decoder, {places[path][1]: _metered(places[path], each) for path, each in meters.items()}):
            for index, group in enumerate(groups):
                hidden[index] = _after(decoder, hidden[index], group)
        if model.is_first:
            errors[_EMBEDDING] = _squares(_after(decoder, before + _error(before, before), groups[0]) - hidden[0])
        for path, (inside, place) in places.items():
            noisy = partial(NoisyOutput, of_outputs=inside in _KV_B)
            with _replaced(decoder, {place: noisy}):
                errors[path] = _squares(_after(decoder, before, groups[0]) - hidden[0])
        if model.is_last:
            meters[_HEAD] = ColumnSquares()
            for states in hidden:
                meters[_HEAD].add(model.model.norm(states))
        found.update({path: squares.means() for path, squares in meters.items() if squares.seen})
        del model, decoder, meters
        give_back_memory()
        say(f"layer {layer} of {walk.layers}")
    final = _NOISE**2 * _squares(hidden[0])
    return InputStatistics(found, {path: error / final for path, error in errors.items()} | {_HEAD: 1.0})


def _after(decoder: DecoderLayer, x: mx.array, group: TokenGroup) -> mx.array:
    """(N, D) after the layer."""
    h = attend(decoder, x, group)
    out: mx.array = h + decoder.mlp(decoder.post_attention_layernorm(h))
    mx.eval(out)
    return out


def _squares(x: mx.array) -> float:
    return float(np.square(np.array(x.astype(mx.float32)), dtype=np.float64).sum())


def _places(decoder: DecoderLayer, checkpoint: Checkpoint, layer: int) -> dict[str, tuple[str, str]]:
    """Modules of a layer that can be packed, by path: their place in it, and that of the module to watch in their stead."""
    prefix, places = f"model.layers.{layer}.", dict[str, tuple[str, str]]()
    for source in checkpoint.manifest(layer, layer + 1).sources:
        # A router that is packed chooses experts: it has no output that an error could be put on.
        if source.spec.quantizable and source.spec.kind != "router" and source.spec.path.startswith(prefix):
            inside = source.spec.path.removeprefix(prefix)
            place = _LATENT if inside in _KV_B else inside
            holder, name = _holder(decoder, place)
            if name in holder:
                places[source.spec.path] = (inside, place)
    return places


def _metered(place: tuple[str, str], squares: ColumnSquares) -> Callable[[nn.Module], nn.Module]:
    kind = MeteredOutput if place[0] in _KV_B else MeteredInput
    return partial(kind, squares=squares)


def _holder(decoder: DecoderLayer, place: str) -> tuple[Any, str]:
    *parents, name = place.split(".")
    holder: Any = decoder
    for parent in parents:
        holder = holder[parent]
    return holder, name


@contextmanager
def _replaced(decoder: DecoderLayer, made: Mapping[str, Callable[[nn.Module], nn.Module]]) -> Iterator[None]:
    """Modules of a layer with others around them, for a while."""
    originals = {}
    for place, make in made.items():
        holder, name = _holder(decoder, place)
        originals[place] = holder[name]
        holder[name] = make(holder[name])
    try:
        yield
    finally:
        for place, original in originals.items():
            holder, name = _holder(decoder, place)
            holder[name] = original


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
        tensors = {path: StoredTensor("F32", values) for path, values in found.columns.items()}
        write_file(part, tensors, metadata={"worth": json.dumps(dict(found.worth))})
        part.replace(output)
    except OSError as error:
        raise UsageError("the inputs cannot be written", found=error.strerror, where=output) from None
    return len(found.columns)
