"""Modules whose projections may be replaced, as mlx-lm's tuner puts LoRA and DoRA in their places, and our own of these.

What was made of the projections before must not outlive them: an adapter that is silently left out is the worst of errors.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import mlx.core as mx
import mlx.nn as nn

if TYPE_CHECKING:
    from exo_kimi.models.kimi_k2 import Model
    from exo_kimi.models.projection import Projection

M = TypeVar("M", bound=nn.Module)


class Adaptable(nn.Module):
    """A module with projections by name. Replacing one takes effect at once.

    Attributes:
        together: projections of one input, which can lie in one array.
        projections: all of them.
        fused: the array of those that lie together; None once one of them is another module.
        adapted: whether one of those that fast paths read the arrays of is an adapter, which only its own call knows: they give
            way to calls then.
    """

    together: ClassVar[tuple[str, ...]] = ()
    projections: ClassVar[tuple[str, ...]] = ()
    called: ClassVar[tuple[str, ...]] = ()
    """Projections that fast paths call too, as modules."""
    fused: Projection | None = None
    adapted = False

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        if name in self.projections:
            read = (each for each in self.projections if each not in self.called)
            self.adapted = any(each in self and not is_plain(self[each]) for each in read)
            if name in self.together:
                self.fused = None


def is_plain(module: nn.Module) -> bool:
    """Whether a projection holds its own weight, plain or quantized, as an adapter around one does not."""
    return "weight" in module


def dense_weight(adapter: nn.Module, dtype: mx.Dtype) -> mx.array:
    """(outputs, inputs) of what an adapter without a bias computes, differentiable as its call is: what it makes of the unit
    vectors."""
    return adapter(mx.eye(adapter.lora_a.shape[0], dtype=dtype)).T


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdapterArrays:
    """What an adapter has for one projection: (in, r), (r, out), and for DoRA the length of each row of the result (out,)."""

    lora_a: mx.array
    lora_b: mx.array
    magnitude: mx.array | None
    scale: float
    dropout: float = 0.0


class AdaptedLinear(nn.Module):
    """x W^T + scale (x A) B, or with DoRA m / |W + scale (A B)^T| times that, row by row; plus the bias of its linear.

    Under mlx-lm's names: `linear`, `lora_a`, `lora_b`, `m`. Nothing is unpacked in a pass: the rows' lengths come of

        |W + s (A B)^T|^2 = |W|^2 + 2 s W A . B^T + s^2 |(A B)^T|^2

    and no gradient goes through them.

    Args:
        linear: nn.Linear or nn.QuantizedLinear.
        arrays: of the adapter.

    Source: LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353, section 4.3; mlx-lm `tuner/lora.py`, `tuner/dora.py`.
    """

    def __init__(self, linear: nn.Module, arrays: AdapterArrays) -> None:
        super().__init__()
        self.linear = linear
        self.lora_a, self.lora_b = arrays.lora_a, arrays.lora_b
        self.scale = arrays.scale
        self.dropout = nn.Dropout(arrays.dropout)
        self._gain: mx.array | None = None
        if arrays.magnitude is not None:
            self.m = arrays.magnitude
            self._squares = row_lengths(linear) ** 2
            mx.eval(self._squares)

    def __call__(self, x: mx.array) -> mx.array:
        """(..., in) to (..., out)."""
        y: mx.array = self["linear"](x)
        added = self.scale * ((self["dropout"](x) @ self["lora_a"]) @ self["lora_b"])
        if "m" not in self:
            return y + added.astype(x.dtype)
        bias = self["linear"].get("bias")
        y = y if bias is None else y - bias
        y = self.gain().astype(x.dtype) * (y + added.astype(x.dtype))
        return y if bias is None else y + bias

    def gain(self) -> mx.array:
        """(out,) what DoRA multiplies each output with; kept where nothing is trained."""
        if self.training:
            return self["m"] / mx.stop_gradient(self._lengths())
        if self._gain is None:
            self._gain = self["m"] / self._lengths()
            mx.eval(self._gain)
        return self._gain

    def _set_training_mode(self, mode: bool) -> None:
        super()._set_training_mode(mode)
        self._gain = None

    def _lengths(self) -> mx.array:
        a, b = self["lora_a"].astype(mx.float32), self["lora_b"].astype(mx.float32)
        linear = self["linear"]
        projected = linear(a.T)  # (r, out): W A, transposed
        if "bias" in linear:
            projected = projected - linear["bias"]
        crossed = (projected * b).sum(axis=0)
        own = ((a.T @ a) @ b * b).sum(axis=0)
        return mx.sqrt(self._squares + 2 * self.scale * crossed + self.scale**2 * own)


def row_lengths(linear: nn.Module) -> mx.array:
    """(out,) float32, of a linear's rows: what DoRA's m begins with."""
    weight = linear["weight"]
    if "scales" in linear:
        weight = mx.dequantize(
            weight,
            linear["scales"],
            linear.get("biases"),
            group_size=linear.group_size,
            bits=linear.bits,
            mode=linear.mode,
        )
    return mx.linalg.norm(weight.astype(mx.float32), axis=1)


def attach(model: Model, arrays: Mapping[str, AdapterArrays]) -> None:
    """Put adapters around projections of a model, in place.

    Args:
        model: or a stage.
        arrays: by path; each is of a layer that the model has.
    """
    for path, own in arrays.items():
        parent, _, name = path.rpartition(".")
        module: Any = model
        for step in parent.split("."):
            module = module[int(step)] if isinstance(module, list) else module[step]
        module[name] = AdaptedLinear(module[name], own)
        module[name].train(model.training)


def with_adapter(model: Model, arrays: Mapping[str, AdapterArrays]) -> Model:
    """The same model with an adapter, beside it: every array that the adapter does not bring is shared, and projections that lie
    in one array stay so where none of them is adapted."""
    view = shallow_copy(model)
    view.model = shallow_copy(model.model)
    view.model.layers = list(model.model.layers)
    copied: dict[str, Any] = {}
    for path in arrays:
        _, _, number, *names = path.split(".")[:-1]
        at = f"model.layers.{number}"
        if at not in copied:
            copied[at] = view.model.layers[int(number)] = shallow_copy(view.model.layers[int(number)])
        for name in names:
            within = f"{at}.{name}"
            if within not in copied:
                _replace(copied[at], name, shallow_copy(copied[at][name]))
                copied[within] = copied[at][name]
            at = within
    attach(view, arrays)
    return view


def shallow_copy(module: M) -> M:
    """A module of its own that holds the same modules and arrays."""
    made = copy.copy(module)
    if isinstance(made, Adaptable) and isinstance(module, Adaptable):  # copying sets every projection anew
        made.fused, made.adapted = module.fused, module.adapted
    return made


def _replace(owner: nn.Module, name: str, module: nn.Module) -> None:
    owner[name] = module
