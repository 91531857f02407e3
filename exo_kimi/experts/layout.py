"""Where each expert of a layer lies on disk, and what its bytes become in a slot, for every published layout.

A slot holds the three projections of one expert as parameters of `models.moe.ExpertGLU`: `weight`, and for packed weights
`scales` and (affine) `biases`. Biases of compressed-tensors' integers are made from the scales and never read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from exo_kimi.checkpoint.index import TensorEntry
from exo_kimi.checkpoint.manifest import ModuleSource
from exo_kimi.errors import DtypeError

FLOATS = ("BF16", "F16", "F32")
FLOAT_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Safetensors' names of the dtypes that a user may choose."""

WIDTHS = {"BF16": 2, "F16": 2, "F32": 4, "U32": 4, "I32": 4, "U8": 1, "F8_E4M3": 1}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes of one tensor, from `start` to `end` of its file."""

    entry: TensorEntry
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """How many."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class StoredPart:
    """One tensor of a projection for all experts: a tensor each, or one stack of all.

    Args:
        entries: the tensors, in the order of the experts.
        experts: how many experts they hold.
    """

    entries: tuple[TensorEntry, ...]
    experts: int

    @property
    def dtype(self) -> str:
        """Safetensors' name of it."""
        return self.entries[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one expert."""
        shape = self.entries[0].shape
        return shape if len(self.entries) == self.experts and len(shape) < 3 else shape[1:]

    @property
    def nbytes(self) -> int:
        """Of one expert."""
        return self.entries[0].nbytes * len(self.entries) // self.experts

    def range_of(self, expert: int) -> ByteRange:
        """Where an expert's bytes are."""
        size = self.nbytes
        entry = self.entries[expert * len(self.entries) // self.experts]
        start = entry.start + (0 if len(self.entries) == self.experts else expert * size)
        return ByteRange(entry, start, start + size)


@dataclass(frozen=True, slots=True)
class Leaf:
    """One parameter of a projection, as a slot holds it.

    Args:
        name: `weight`, `scales` or `biases`.
        dtype: in the slot; F8_E4M3 never is.
        shape: of one expert.
        stored: what it is read from; None for biases, which are made of the scales.
        scale: block factors of FP8 codes.
        zero: biases are -`zero` * scales.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stored: StoredPart | None
    scale: StoredPart | None = None
    zero: int = 0

    @property
    def nbytes(self) -> int:
        """Of one expert in memory."""
        return prod(self.shape) * WIDTHS[self.dtype]

    @property
    def is_copied(self) -> bool:
        """Whether a slot holds the very bytes of the file."""
        return self.stored is not None and self.scale is None and _same_bytes(self.stored.dtype, self.dtype)


@dataclass(frozen=True, slots=True)
class ProjectionLayout:
    """One projection of a layer's experts: its path, and its leaves, `scales` before the `biases` that are made of them."""

    path: str
    leaves: tuple[Leaf, ...]

    def ranges_of(self, expert: int) -> Iterator[ByteRange]:
        """What is read for one expert."""
        for leaf in self.leaves:
            for part in (leaf.stored, leaf.scale):
                if part is not None:
                    yield part.range_of(expert)


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """The routed experts of one layer.

    Args:
        layer: its number.
        experts: E.
        projections: gate_proj, up_proj and down_proj.
    """

    layer: int
    experts: int
    projections: tuple[ProjectionLayout, ...]

    @property
    def disk_bytes(self) -> int:
        """What is read for one expert."""
        return sum(part.nbytes for each in self.projections for part in each.ranges_of(0))

    @property
    def slot_bytes(self) -> int:
        """What one expert takes in memory."""
        return sum(leaf.nbytes for each in self.projections for leaf in each.leaves)

    def expert_bytes(self, expert: int) -> tuple[ByteRange, ...]:
        """Where one expert lies."""
        return tuple(part for each in self.projections for part in each.ranges_of(expert))


def layouts_of(sources: Sequence[ModuleSource], *, floats: str | None = None) -> dict[int, LayerLayout]:
    """The routed experts of every layer among the modules of a stage.

    Args:
        sources: of a manifest.
        floats: BF16, F16 or F32 for every floating parameter; None keeps what is stored (BF16 for FP8).

    Raises:
        DtypeError: a tensor stored in a dtype that no parameter can have.
    """
    layers: dict[int, dict[str, ModuleSource]] = {}
    for source in sources:
        if source.spec.kind == "experts" and source.spec.layer is not None:
            layers.setdefault(source.spec.layer, {})[source.spec.path.rpartition(".")[2]] = source
    return {layer: _layer(layer, modules, floats) for layer, modules in sorted(layers.items())}


def _layer(layer: int, modules: Mapping[str, ModuleSource], floats: str | None) -> LayerLayout:
    projections = tuple(
        ProjectionLayout(modules[name].spec.path, tuple(_leaves(modules[name], floats))) for name in PROJECTIONS
    )
    return LayerLayout(layer, modules[PROJECTIONS[0]].spec.shape[0], projections)


def _leaves(source: ModuleSource, floats: str | None) -> Iterator[Leaf]:
    experts = source.spec.shape[0]
    parts = {name: StoredPart(entries, experts) for name, entries in source.parts.items()}
    if source.layout == "fp8":
        weight = parts["weight"]
        yield Leaf("weight", floats or "BF16", weight.shape, weight, scale=parts["weight_scale_inv"])
        return
    if source.layout == "int4":
        yield _as_stored("weight", parts["weight_packed"], floats)
        scales = _as_stored("scales", parts["weight_scale"], floats)
        yield scales
        bits = source.quant.bits if source.quant is not None else 4
        yield Leaf("biases", scales.dtype, scales.shape, None, zero=1 << (bits - 1))
        return
    for name, part in parts.items():
        yield _as_stored(name, part, floats)


def _as_stored(name: str, part: StoredPart, floats: str | None) -> Leaf:
    if part.dtype in FLOATS:
        return Leaf(name, floats or part.dtype, part.shape, part)
    if part.dtype not in ("U32", "I32", "U8"):
        first = part.entries[0]
        raise DtypeError(first.name, expected="BF16, F16, F32, U32, I32, U8", found=first.dtype, where=first.file)
    return Leaf(name, "U8" if part.dtype == "U8" else "U32", part.shape, part)


def _same_bytes(stored: str, wanted: str) -> bool:
    return stored == wanted or {stored, wanted} == {"I32", "U32"}
