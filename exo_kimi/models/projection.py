"""The arrays of a projection: of one module, or of several with one input whose rows lie in one array.

One matmul does the work of several then. The modules keep their checkpoint keys: their parameters become views of the common
array.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import is_
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn

from exo_kimi.models import ops

LEAVES = ("weight", "scales", "biases")


@dataclass(
    slots=True
)  # not frozen, which would triple what making one takes; one is made in every layer of a decode step
class Projection:
    """x W^T, plain or quantized.

    Args:
        weight: (outputs, packed inputs), or (H or E, outputs, packed inputs) for heads or experts.
        scales, biases: None where there are none.
        group_size, bits, mode: of the packing; of no meaning for plain weights.
        parts: what the modules that share these arrays hold, views of them; empty for one module.
    """

    weight: mx.array
    scales: mx.array | None
    biases: mx.array | None
    group_size: int | None
    bits: int | None
    mode: str
    parts: tuple[mx.array, ...] = ()

    @classmethod
    def of(cls, module: nn.Module) -> Self:
        """What one module without a bias of its outputs holds; nothing is copied."""
        if "scales" not in module:
            return cls(module["weight"], None, None, None, None, "affine")
        return cls(
            module["weight"], module["scales"], module.get("biases"), module.group_size, module.bits, module.mode
        )

    def __call__(self, x: mx.array, *, transpose: bool = True) -> mx.array:
        """All outputs of (..., inputs), laid end to end; without `transpose`, x W of (..., outputs)."""
        if self.scales is None:
            return x @ (self.weight.swapaxes(-1, -2) if transpose else self.weight)
        return mx.quantized_matmul(
            x,
            self.weight,
            self.scales,
            self.biases,
            transpose=transpose,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )

    def of_experts(
        self, x: mx.array, experts: mx.array, *, rows: mx.array | None = None, in_order: bool = False
    ) -> mx.array:
        """All outputs of chosen experts.

        Args:
            x: (..., M, inputs).
            experts: which expert for each matrix of the result.
            rows: which matrix of x for each; None pairs them by broadcasting.
            in_order: whether `experts` ascend.
        """
        if self.scales is None:
            weight = self.weight.swapaxes(-1, -2)
            # gather_mm on the CPU takes float32 only: 0.32 raises, 0.31 may crash the process.
            dtype = mx.float32 if ops.on_cpu() else x.dtype
            y = mx.gather_mm(
                x.astype(dtype),
                weight.astype(dtype),
                lhs_indices=rows,
                rhs_indices=experts,
                sorted_indices=in_order,
            )
            return y.astype(x.dtype)
        return mx.gather_qmm(
            x,
            self.weight,
            self.scales,
            self.biases,
            lhs_indices=rows,
            rhs_indices=experts,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=in_order,
        )

    def rows_of_heads(self, heads: int, rows: slice) -> Self:
        """The chosen rows of each head's, (H, rows, packed inputs): views, evaluated."""

        def view(array: mx.array) -> mx.array:
            return array.reshape(heads, -1, array.shape[-1])[:, rows]

        scales, biases = (None if array is None else view(array) for array in (self.scales, self.biases))
        chosen = replace(self, weight=view(self.weight), scales=scales, biases=biases)
        mx.eval([each for each in (chosen.weight, scales, biases) if each is not None])
        return chosen

    def is_shared_by(self, modules: Sequence[nn.Module]) -> bool:
        """Whether modules still hold the views of these arrays that `adopt` gave them."""
        leaves = _leaves(modules)
        return len(self.parts) == len(leaves) and all(map(is_, self.parts, leaves))


def agree(modules: Sequence[nn.Module]) -> bool:
    """Whether projections can lie in one array: the same inputs, experts, bits and dtypes, and no bias of the outputs."""

    def form(module: nn.Module) -> tuple[Any, ...]:
        leaves = [module.get(leaf) for leaf in LEAVES]
        shapes = [None if leaf is None else (leaf.dtype, *leaf.shape[:-2], leaf.shape[-1]) for leaf in leaves]
        return (*shapes, *(getattr(module, name, None) for name in ("group_size", "bits", "mode")))

    plain = all("bias" not in module and getattr(module, "global_scale", None) is None for module in modules)
    return plain and len({form(module) for module in modules}) == 1


def are_one(module: Any, parts: Sequence[nn.Module]) -> bool:
    """Whether projections lie in the array that their module has for them."""
    return module.fused is not None and module.fused.is_shared_by(parts)


def fuse(modules: Sequence[nn.Module]) -> Projection:
    """Put projections that agree into one array. Their parameters become views of it, so that what they held is freed;
    meanwhile both are held, for these projections only."""
    together = {
        leaf: mx.concatenate([module[leaf] for module in modules], axis=-2) for leaf in LEAVES if leaf in modules[0]
    }
    one = adopt(modules, together)
    mx.eval([module[leaf] for module in modules for leaf in together])
    return one


def adopt(modules: Sequence[nn.Module], together: Mapping[str, mx.array]) -> Projection:
    """The same of arrays that hold the rows of every projection already; evaluates nothing.

    Args:
        modules: they agree.
        together: (..., outputs of all, columns) by leaf.
    """
    first = 0
    for module in modules:
        count = module.weight.shape[-2]
        for leaf, array in together.items():
            module[leaf] = array[..., first : first + count, :]
        first += count
    return replace(
        Projection.of(modules[0]),
        weight=together["weight"],
        scales=together.get("scales"),
        biases=together.get("biases"),
        parts=_leaves(modules),
    )


def _leaves(modules: Sequence[nn.Module]) -> tuple[mx.array, ...]:
    return tuple(module[leaf] for module in modules for leaf in LEAVES if module.get(leaf) is not None)
