"""Kimi Delta Attention in numbers: which layers have it, how wide it is, and what it holds of a sequence.

Source: "Kimi Linear", arXiv 2510.26692; `linear_attn_config` of moonshotai/Kimi-Linear-48B-A3B-Instruct.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exo_kimi.arch.numbers import is_number
from exo_kimi.errors import CheckpointError, ConfigError

STATE_ELEMENT_BYTES = 4
"""A recurrent state is float32 whatever the activations are: rounded to bf16 at every step it drifts by 0.05 of a deviation."""

_FIX = "copy config.json from the source"
_NUMBERS = ("num_heads", "head_dim", "short_conv_kernel_size")
# What transformers 5 calls the same numbers, at the top level.
_FLAT = ("linear_num_heads", "linear_head_dim", "linear_conv_kernel_dim")
_LINEAR, _FULL = "linear_attention", "full_attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearAttention:
    """The layers of a model with Kimi Delta Attention (KDA); the others attend to the whole context.

    Args:
        layers: their numbers, from 0, ascending.
        num_heads: heads of a layer.
        head_dim: width of a head's queries, keys and values.
        short_conv_kernel_size: taps of the convolutions over queries, keys and values.
    """

    layers: tuple[int, ...]
    num_heads: int
    head_dim: int
    short_conv_kernel_size: int

    @property
    def width(self) -> int:
        """Elements of all heads' queries of one token."""
        return self.num_heads * self.head_dim

    @property
    def recurrent_elements(self) -> int:
        """Elements of a layer's recurrent state, a matrix a head."""
        return self.width * self.head_dim

    @property
    def conv_elements(self) -> int:
        """Elements of what a layer keeps of the last tokens' queries, keys and values before the convolutions."""
        return (self.short_conv_kernel_size - 1) * 3 * self.width

    def state_bytes(self, *, bytes_per_element: int = 2) -> int:
        """Bytes that one layer holds of a sequence of any length.

        Args:
            bytes_per_element: of an activation.
        """
        return self.recurrent_elements * STATE_ELEMENT_BYTES + self.conv_elements * bytes_per_element


def read_linear_attention(
    text: Mapping[str, Any], layers: int, where: object, problems: list[CheckpointError]
) -> LinearAttention | None:
    """Read `linear_attn_config`, whose layers count from 1, or transformers 5's `layer_types` and `linear_*`, which replace it.

    Args:
        text: the text model's keys.
        layers: of the model.
        where: named in errors.
        problems: what is wrong is appended.

    Returns:
        None with a problem.
    """
    section = text.get("linear_attn_config")
    if section is not None and not isinstance(section, Mapping):
        problems.append(
            ConfigError("linear_attn_config has the wrong type", expected="an object", found=repr(section), where=where)
        )
        return None
    numbers = _numbers(text, section, where, problems)
    chosen = _layers(text, section, layers, where, problems)
    if numbers is None or chosen is None:
        return None
    return LinearAttention(layers=chosen, **numbers)


def _numbers(
    text: Mapping[str, Any], section: Mapping[str, Any] | None, where: object, problems: list[CheckpointError]
) -> dict[str, int] | None:
    names = dict(zip(_NUMBERS, _FLAT if section is None else _NUMBERS, strict=True))
    source = text if section is None else section
    values = {field: source.get(name) for field, name in names.items()}
    wrong = [names[field] for field, value in values.items() if not is_number(value, int) or not value or value < 1]
    if wrong:
        problems.append(
            ConfigError(
                f"{', '.join(wrong)} of the KDA layers cannot be read",
                expected="whole numbers from 1",
                found=", ".join(repr(source.get(name)) for name in wrong)[:80],
                where=where,
                fix=_FIX,
            )
        )
        return None
    return {field: int(value) for field, value in values.items() if value is not None}


def _layers(
    text: Mapping[str, Any],
    section: Mapping[str, Any] | None,
    layers: int,
    where: object,
    problems: list[CheckpointError],
) -> tuple[int, ...] | None:
    """The KDA layers, from 0. They are listed, and never follow from a rule: of 27 layers the last is no multiple of 4."""
    kinds = text.get("layer_types")
    stated = None
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != layers or not set(map(str, kinds)) <= {_LINEAR, _FULL}:
            problems.append(
                ConfigError(
                    "layer_types cannot be read",
                    expected=f"{layers} times {_LINEAR} or {_FULL}",
                    found=repr(kinds)[:80],
                    where=where,
                    fix=_FIX,
                )
            )
            return None
        stated = tuple(layer for layer, kind in enumerate(kinds) if kind == _LINEAR)
    if section is None:
        if stated is None:
            problems.append(
                ConfigError(
                    "linear_attn_config is missing",
                    expected="an object with kda_layers and full_attn_layers",
                    where=where,
                    fix=_FIX,
                )
            )
        return stated
    linear, full = (section.get(name) for name in ("kda_layers", "full_attn_layers"))
    lists = isinstance(linear, list) and isinstance(full, list)
    both = [*linear, *full] if isinstance(linear, list) and isinstance(full, list) else []
    if not lists or not all(is_number(each, int) for each in both) or sorted(both) != list(range(1, layers + 1)):
        problems.append(
            ConfigError(
                "kda_layers and full_attn_layers are no partition of the layers",
                expected=f"each of 1 to {layers} in one of the two lists (they count from 1)",
                found=f"kda_layers {linear!r}"[:60] + f", full_attn_layers {full!r}"[:60],
                where=where,
                fix=_FIX,
            )
        )
        return None
    found = tuple(sorted(int(each) - 1 for each in linear or ()))
    if stated is not None and stated != found:
        problems.append(
            ConfigError(
                "layer_types is another model than linear_attn_config",
                expected=f"{_LINEAR} in layers {', '.join(map(str, found))} (from 0)"[:120],
                found=f"{_LINEAR} in layers {', '.join(map(str, stated))}"[:120],
                where=where,
                fix=_FIX,
            )
        )
        return None
    return found
