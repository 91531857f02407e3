"""Modules whose projections may be replaced, as mlx-lm's tuner puts LoRA and DoRA in their places.

What was made of the projections before must not outlive them: an adapter that is silently left out is the worst of errors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

if TYPE_CHECKING:
    from exo_kimi.models.projection import Projection


class Adaptable(nn.Module):
    """A module with projections by name. Replacing one takes effect at once.

    Attributes:
        together: projections of one input, which can lie in one array.
        projections: all of them.
        fused: the array of those that lie together; None once one of them is another module.
        adapted: whether one of them is an adapter, which only its own call knows: fast paths give way to calls then.
    """

    together: ClassVar[tuple[str, ...]] = ()
    projections: ClassVar[tuple[str, ...]] = ()
    fused: Projection | None = None
    adapted = False

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        if name in self.projections:
            self.adapted = any(each in self and not is_plain(self[each]) for each in self.projections)
            if name in self.together:
                self.fused = None


def is_plain(module: nn.Module) -> bool:
    """Whether a projection holds its own weight, plain or quantized, as an adapter around one does not."""
    return "weight" in module


def dense_weight(adapter: nn.Module, dtype: mx.Dtype) -> mx.array:
    """(outputs, inputs) of what an adapter without a bias computes, differentiable as its call is: what it makes of the unit
    vectors."""
    return adapter(mx.eye(adapter.lora_a.shape[0], dtype=dtype)).T
