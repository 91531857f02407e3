"""What candidate bits cost each module: the relative error of its output, before anything is written.

    error = sqrt( sum_c h_c |dW_c|^2 / sum_c h_c |W_c|^2 ),  h_c the mean square of input column c, alike for all when unknown

which is the relative error of W x for inputs of independent columns. Samples of rows stand for large modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.modules import ModuleSpec
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.packing import unpack_bits
from exo_kimi.checkpoint.quantization import QuantSpec
from exo_kimi.checkpoint.sources import ModuleSource
from exo_kimi.compress.convert.encoding import PackedRows, pack_rows
from exo_kimi.compress.convert.float_modes import decode
from exo_kimi.compress.convert.rows import SourceRows
from exo_kimi.compress.convert.run import processors
from exo_kimi.compress.convert.targets import ModuleTarget
from exo_kimi.compress.ranges import RangeReader
from exo_kimi.planner.weights.recipes import Recipe, Rule

Floats = NDArray[np.float32]

CANDIDATES: tuple[QuantSpec | None, ...] = (
    *(QuantSpec(bits, group) for bits in (2, 3, 4) for group in (128, 64, 32)),
    *(QuantSpec(bits, 64) for bits in (5, 6, 8)),
    None,
)
"""Bits that are tried: MLX's affine ones, and plain."""

SAMPLE_WEIGHTS = 2**18
_SAMPLED_MATRICES = 8


@dataclass(frozen=True, slots=True)
class BitOption:
    """One choice for a module: its packing (None plain), its bytes, and the relative error of its output."""

    packing: QuantSpec | None
    nbytes: int
    error: float


@dataclass(frozen=True, slots=True)
class ModuleErrors:
    """A module and what each choice of bits does to it.

    Args:
        path: as recipes name it: kv_b_proj for its two halves.
        layer: None outside the layers.
        worth: what its squared error counts in the sum, see `worth`.
        options: by bytes, the fewest first.
    """

    path: str
    layer: int | None
    worth: float
    options: tuple[BitOption, ...]


def measure(
    checkpoint: Checkpoint,
    *,
    layers: tuple[int, int] | None = None,
    candidates: Sequence[QuantSpec | None] = CANDIDATES,
    importance: Mapping[str, Floats] | None = None,
    worths: Mapping[str, float] | None = None,
    workers: int | None = None,
    on_module: Callable[[str], None] | None = None,
) -> tuple[ModuleErrors, ...]:
    """Measure every module that can be packed.

    Args:
        checkpoint: the source, in any layout.
        layers: a half-open range; all by default.
        candidates: what to try; those whose groups do not divide a module's rows are left out.
        importance: mean squares of the input's columns by module path: (in,), or (E, in) for experts.
        worths: what errors count, by module path, as `calibrate --inputs` measured it; see `worth` where it has none.
        workers: threads; one a processor by default.
        on_module: called with each path when it is done.

    Raises:
        CheckpointError: the source cannot be read.
    """
    start, end = layers or (0, None)
    manifest = checkpoint.manifest(start, end)
    sources = [source for source in manifest.sources if source.spec.quantizable]
    with RangeReader(checkpoint.directory) as reader, ThreadPoolExecutor(workers or processors()) as pool:

        def one(source: ModuleSource) -> ModuleErrors:
            rows = SourceRows(reader, source)
            columns = None if importance is None else importance.get(source.spec.path)
            found = ModuleErrors(
                source.spec.path,
                source.spec.layer,
                (worths or {}).get(source.spec.path, worth(manifest.config, source.spec)),
                _measure(rows, candidates, columns),
            )
            if on_module is not None:
                on_module(source.spec.path)
            return found

        return _joined(list(pool.map(one, sources)))


def _measure(
    rows: SourceRows, candidates: Sequence[QuantSpec | None], importance: Floats | None
) -> tuple[BitOption, ...]:
    spec = rows.source.spec
    usable = [each for each in candidates if each is None or spec.shape[-1] % each.group_size == 0]
    squared, total = dict.fromkeys(usable, 0.0), 0.0
    for matrix, first, end in _sampled(rows):
        weights = rows.floats(matrix, first, end)
        columns = None
        if importance is not None:
            columns = importance[matrix] if importance.ndim == 2 else importance
        total += _weighed(weights, columns)
        for packing in usable:
            if packing != rows.source.quant or packing is None:  # else its bytes are moved
                squared[packing] += _weighed(_rounded(rows.source, weights, packing, columns) - weights, columns)
    options = [
        BitOption(packing, _bytes_of(spec, packing), math.sqrt(error / total) if total else 0.0)
        for packing, error in squared.items()
    ]
    return tuple(sorted(options, key=lambda option: option.nbytes))


def _sampled(rows: SourceRows) -> list[tuple[int, int, int]]:
    """Rows that stand for a module: all of a small one; else runs at even distances in up to eight matrices."""
    matrices = min(rows.matrices, _SAMPLED_MATRICES)
    chosen = [rows.matrices * index // matrices for index in range(matrices)]
    count = min(rows.out, max(1, SAMPLE_WEIGHTS // rows.into // matrices))
    pieces = []
    for index, matrix in enumerate(chosen):
        first = (rows.out - count) * (2 * index + 1) // (2 * matrices)
        pieces.append((matrix, first, first + count))
    return pieces


def _rounded(source: ModuleSource, weights: Floats, packing: QuantSpec | None, columns: Floats | None) -> Floats:
    """Weights as they are after packing."""
    if packing is None:
        return weights.astype(ml_dtypes.bfloat16).astype(np.float32)
    target = ModuleTarget(source.spec, source, packing, "BF16", "")
    return unpacked(pack_rows(weights, target, "search", importance=columns), packing)


def unpacked(packed: PackedRows, packing: QuantSpec) -> Floats:
    """The values of packed rows: (rows, in) float32."""
    count = len(packed.words)
    codes = unpack_bits(packed.words, packing.bits).reshape(-1, packing.group_size)
    if packed.biases is None:
        return decode(codes.T, packed.scales.reshape(-1), packing.mode).T.reshape(count, -1)
    scales, biases = (part.astype(np.float32).reshape(-1, 1) for part in (packed.scales, packed.biases))
    values: Floats = (codes * scales + biases).reshape(count, -1)
    return values


def _weighed(values: Floats, columns: Floats | None) -> float:
    squares = np.square(values, dtype=np.float32).sum(0, dtype=np.float64)
    return float(squares.sum() if columns is None else squares @ columns.astype(np.float64))


def _bytes_of(spec: ModuleSpec, packing: QuantSpec | None) -> int:
    """As the planner counts them."""
    rule = Rule(bits=16, group_size=64) if packing is None else _rule(packing)
    return Recipe(name="", title="", source="", rules=(rule,), hash="").weight_bytes(spec)


def _rule(packing: QuantSpec) -> Rule:
    return Rule(bits=packing.bits, group_size=packing.group_size, mode=packing.mode)


def _joined(found: Sequence[ModuleErrors]) -> tuple[ModuleErrors, ...]:
    """The halves of a kv_b_proj as the one module that a recipe speaks of."""
    joined: list[ModuleErrors] = []
    for each in found:
        base, _, name = each.path.rpartition(".")
        if name == "unembed_out":
            half = joined.pop()
            other = {option.packing: option for option in each.options}
            both = [
                BitOption(
                    one.packing,
                    one.nbytes + other[one.packing].nbytes,
                    math.hypot(one.error, other[one.packing].error) / math.sqrt(2),
                )
                for one in half.options
                if one.packing in other
            ]
            joined.append(ModuleErrors(f"{base}.kv_b_proj", each.layer, each.worth, tuple(both)))
        else:
            joined.append(each)
    return tuple(joined)


def errors_text(modules: Sequence[ModuleErrors]) -> str:
    """A table: a line a module, relative errors in percent by bits and group."""
    kinds = sorted({option.packing for each in modules for option in each.options}, key=_order)
    head = ["module", *("plain" if kind is None else f"{kind.bits}/{kind.group_size}" for kind in kinds)]
    lines = [head]
    for each in modules:
        by_kind = {option.packing: option.error for option in each.options}
        lines.append([each.path, *(f"{100 * by_kind[kind]:.2f}" if kind in by_kind else "-" for kind in kinds)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    return "\n".join([*text, "relative error of the output in %, by bits/group of the weights"])


def _order(packing: QuantSpec | None) -> tuple[int, int]:
    return (16, 0) if packing is None else (packing.bits, -packing.group_size)


def worth(config: KimiConfig, spec: ModuleSpec) -> float:
    """What a module's squared relative error counts in that of the logits, without data.

    The residual stream is the sum of the embedding and two branches a layer, taken as equals: an error inside a branch is one of
    2 L + 1 shares of the final state. The head's error reaches the logits whole. In a MoE branch the K chosen experts, whose
    weights sum to the scaling factor s, have the variance s^2 / K where the shared expert has 1. (That a branch passes errors of
    the state before it on as they came was tried, which gives the embedding and early layers more: worse on the tiny Kimi.)
    """
    if spec.path == "lm_head":
        return 1.0
    share = 1.0 / (2 * config.num_hidden_layers + 1)
    routed = config.routed_scaling_factor**2 / config.num_experts_per_tok
    if spec.kind == "experts" and config.n_shared_experts:
        return share * routed / (routed + 1.0)
    return share / (routed + 1.0) if ".shared_experts." in spec.path else share
