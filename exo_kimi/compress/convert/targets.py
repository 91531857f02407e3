"""What is written of each module: its tensors, its bits, and from which rows of the source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.modules import ModuleSpec, absorbed_modules
from exo_kimi.checkpoint.manifest import StageManifest
from exo_kimi.checkpoint.quantization import QuantSpec
from exo_kimi.checkpoint.sources import ModuleSource
from exo_kimi.compress.output.shards import OutputTensor
from exo_kimi.errors import UsageError
from exo_kimi.planner.weights.recipes import Recipe

BLOCK_WEIGHTS = 2**17
"""Weights of a block, unless one row has more: half a megabyte of float32, which a processor's cache holds."""

_SIXTEEN_BITS = ("BF16", "F16")
_CORRECTION = "e_score_correction_bias"
CARRIED_KINDS = ("conv", "decay")
"""Modules that are copied as they are."""


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Rows [first, end) of one matrix of a target."""

    matrix: int
    first: int
    end: int


@dataclass(frozen=True)
class ModuleTarget:
    """One module as it is written.

    Args:
        spec: the module, with `heads` for the halves of a kv_b_proj.
        source: what it is made from; of another spec where a kv_b_proj is split.
        packing: its bits, None for plain floats.
        dtype: of plain weights, scales and biases: `BF16`, or `F16` where the source has that.
        prefix: what the names of its tensors begin with.
        heads: rows of one head of the kv_b_proj that it is a half of (nope, v); None where it is no such half.
    """

    spec: ModuleSpec
    source: ModuleSource
    packing: QuantSpec | None
    dtype: str
    prefix: str
    heads: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """What its tensors begin with."""
        return f"{self.prefix}{self.spec.path}"

    @cached_property
    def moved(self) -> bool:
        """Whether packed bytes are moved as they are, and no weight is computed."""
        source = self.source
        if self.packing is None or source.quant != self.packing or (self.spec.path.endswith(".embed_q") and self.heads):
            return False
        scales = source.parts["weight_scale" if source.layout == "int4" else "scales"][0].dtype
        return scales == ("U8" if self.packing.mode != "affine" else self.dtype)

    @cached_property
    def tensors(self) -> tuple[OutputTensor, ...]:
        """Its tensors, weight first."""
        *leading, into = self.spec.shape
        tensors = []
        if self.packing is None:
            tensors.append(self._tensor("weight", self.dtype, *self.spec.shape))
        else:
            bits, group_size = self.packing.bits, self.packing.group_size
            scales = self.dtype if self.packing.mode == "affine" else "U8"
            tensors.append(self._tensor("weight", "U32", *leading, into * bits // 32))
            tensors.append(self._tensor("scales", scales, *leading, into // group_size))
            if self.packing.mode == "affine":
                tensors.append(self._tensor("biases", scales, *leading, into // group_size))
        if self.spec.kind == "router":
            # mlx-lm's kimi_linear, whose routers are packed, has it in the module around them.
            owner = self.name.removesuffix(".gate") if self.spec.packs else self.name
            tensors.append(OutputTensor(f"{owner}.{_CORRECTION}", "F32", (self.spec.shape[0],)))
        if self.spec.has_bias:
            tensors.append(self._tensor("bias", self.dtype, self.spec.shape[0]))
        return tuple(tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def narrowed(self) -> bool:
        """Whether plain float32 becomes a float of 16 bits."""
        weight = self.source.parts.get("weight")
        return self.source.layout == "plain" and weight is not None and weight[0].dtype == "F32"

    def blocks(self) -> Iterator[RowBlock]:
        """Its rows in blocks, in order."""
        *leading, into = (1, *self.spec.shape) if len(self.spec.shape) == 1 else self.spec.shape
        matrices = 1
        for size in leading[:-1]:
            matrices *= size
        out = leading[-1]
        # Columns of a source's head become rows: a head is read whole.
        rows = out if self.spec.path.endswith(".embed_q") and self.heads else max(1, BLOCK_WEIGHTS // into)
        for matrix in range(matrices):
            for first in range(0, out, rows):
                yield RowBlock(matrix, first, min(out, first + rows))

    def _tensor(self, part: str, dtype: str, *shape: int) -> OutputTensor:
        return OutputTensor(f"{self.name}.{part}", dtype, shape)


def targets_of(manifest: StageManifest, recipe: Recipe, *, keep_kv_b: bool = False) -> tuple[ModuleTarget, ...]:
    """Every module of a layer range as a recipe has it.

    Args:
        manifest: the source.
        recipe: bits of each module.
        keep_kv_b: leave kv_b_proj whole; else it becomes `embed_q` and `unembed_out` where its groups divide their rows.

    Raises:
        UsageError: a group size of the recipe does not divide a module's rows.
    """
    config, targets = manifest.config, list[ModuleTarget]()
    dtype = _float_dtype(manifest)
    split = {spec.path for spec in recipe.modules(config, manifest.start_layer, manifest.end_layer)}
    for source in manifest.sources:
        if source.spec.kind in CARRIED_KINDS:
            continue
        whole = ModuleTarget(source.spec, source, recipe.packing(source.spec), dtype, config.key_prefix)
        halves = _halves(config, source, split)
        if not halves or keep_kv_b:
            targets.append(whole)
        else:
            heads = (config.qk_nope_head_dim, config.v_head_dim)
            targets += [
                ModuleTarget(half, source, recipe.packing(half), dtype, config.key_prefix, heads=heads)
                for half in halves
            ]
    for target in targets:
        if target.packing is not None and target.spec.shape[-1] % target.packing.group_size:
            raise UsageError(
                f"recipe {recipe.name}: groups do not divide the rows of {target.spec.path}",
                expected=f"a group_size that divides {target.spec.shape[-1]}",
                found=target.packing.group_size,
            )
    return tuple(targets)


def _halves(config: KimiConfig, source: ModuleSource, split: set[str]) -> tuple[ModuleSpec, ...]:
    """The modules that a kv_b_proj becomes; none for any other."""
    spec = source.spec
    if spec.layer is None or not spec.path.endswith(".kv_b_proj"):
        return ()
    return tuple(half for half in absorbed_modules(config, spec.layer) if half.path in split)


def _float_dtype(manifest: StageManifest) -> str:
    """The 16-bit float that the source's plain weights, or else its scales, have; BF16 where they have none."""
    for parts in ("weight", "scales", "weight_scale"):
        for source in manifest.sources:
            for entry in source.parts.get(parts, ())[:1]:
                if entry.dtype in _SIXTEEN_BITS:
                    return entry.dtype
    return "BF16"
