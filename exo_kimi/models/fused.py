"""Projections of one input whose rows lie in one array, so that one matmul does the work of several.

The projections keep their checkpoint keys: their parameters become views of the common array. It knows nothing of layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from exo_kimi.models import ops

LEAVES = ("weight", "scales", "biases")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """Several projections as one.

    Args:
        rows: outputs of each projection, in order.
        weight: (outputs, packed inputs), or (E, outputs, packed inputs) for experts; the outputs of all projections.
        scales, biases: None where there are none.
        packing: group_size, bits and mode; empty for plain weights.
    """

    rows: tuple[int, ...]
    weight: mx.array
    scales: mx.array | None
    biases: mx.array | None
    packing: Mapping[str, Any]

    @property
    def cuts(self) -> list[int]:
        """Where to split the outputs."""
        ends = [sum(self.rows[: index + 1]) for index in range(len(self.rows))]
        return ends[:-1]

    def __call__(self, x: mx.array) -> mx.array:
        """All outputs of (..., inputs), laid end to end."""
        if self.scales is None:
            return x @ self.weight.T
        return mx.quantized_matmul(x, self.weight, self.scales, self.biases, transpose=True, **self.packing)

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
            sorted_indices=in_order,
            **self.packing,
        )


def as_one(module: nn.Module) -> Fused:
    """One projection in the same form; nothing is copied."""
    packing = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode} if "scales" in module else {}
    return Fused(
        rows=(module.weight.shape[-2],),
        weight=module.weight,
        scales=module.get("scales"),
        biases=module.get("biases"),
        packing=packing,
    )


def agree(modules: Sequence[nn.Module]) -> bool:
    """Whether projections can lie in one array: the same inputs, experts, bits and dtypes, and no bias of the outputs."""

    def form(module: nn.Module) -> tuple[Any, ...]:
        leaves = [module.get(leaf) for leaf in LEAVES]
        shapes = [None if leaf is None else (leaf.dtype, *leaf.shape[:-2], leaf.shape[-1]) for leaf in leaves]
        return (*shapes, *(getattr(module, name, None) for name in ("group_size", "bits", "mode")))

    plain = all("bias" not in module and getattr(module, "global_scale", None) is None for module in modules)
    return plain and len({form(module) for module in modules}) == 1


def fuse(modules: Sequence[nn.Module]) -> Fused:
    """Put projections that agree into one array. Their parameters become views of it, so that what they held is freed;
    meanwhile both are held, for these projections only."""
    together = {
        leaf: mx.concatenate([module[leaf] for module in modules], axis=-2) for leaf in LEAVES if leaf in modules[0]
    }
    one = adopt(modules, together)
    mx.eval([module[leaf] for module in modules for leaf in together])
    return one


def adopt(modules: Sequence[nn.Module], together: Mapping[str, mx.array]) -> Fused:
    """The same of arrays that hold the rows of every projection already; evaluates nothing.

    Args:
        modules: they agree.
        together: (..., outputs of all, columns) by leaf.
    """
    rows = tuple(module.weight.shape[-2] for module in modules)
    first = 0
    for module, count in zip(modules, rows, strict=True):
        for leaf, array in together.items():
            module[leaf] = array[..., first : first + count, :]
        first += count
    one = as_one(modules[0])
    return Fused(
        rows=rows,
        weight=together["weight"],
        scales=together.get("scales"),
        biases=together.get("biases"),
        packing=one.packing,
    )
