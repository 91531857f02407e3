"""Rotary positions as Llama-like draft heads state them: plain, linear, llama3 or yarn, on halves of a head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from exo_kimi.arch.numbers import is_number
from exo_kimi.arch.rope import yarn_mscale
from exo_kimi.errors import CheckpointError, ConfigError

RopeKind = Literal["default", "linear", "llama3", "yarn"]
_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaRope:
    """Parameters of one rope; those that a kind does not have are not looked at.

    Source: `modeling_rope_utils.py` of transformers; "YaRN", Peng et al. 2023.
    """

    rope_theta: float
    rope_type: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original_max_position_embeddings: float = 0.0
    attention_factor: float | None = None

    @property
    def amplitude(self) -> float:
        """What rotated queries and keys are multiplied with: 1, and yarn's 0.1 ln(factor) + 1."""
        if self.rope_type != "yarn":
            return 1.0
        return yarn_mscale(self.factor, 1.0) if self.attention_factor is None else self.attention_factor

    def wavelengths(self, dims: int) -> list[float]:
        """Tokens per radian of each of dims / 2 pairs."""
        plain = [self.rope_theta ** (pair / dims) for pair in range(0, dims, 2)]
        if self.rope_type == "llama3":
            return [self._llama3(each) for each in plain]
        if self.rope_type == "yarn":
            return self._yarn(plain, dims)
        return [each * self.factor for each in plain] if self.rope_type == "linear" else plain

    def _llama3(self, wavelength: float) -> float:
        turns = self.original_max_position_embeddings / (2 * math.pi * wavelength)
        share = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        share = min(max(share, 0.0), 1.0)
        return 1.0 / ((1 - share) / (self.factor * wavelength) + share / wavelength)

    def _yarn(self, plain: list[float], dims: int) -> list[float]:
        def pair_that_turns(rotations: float) -> float:
            length = self.original_max_position_embeddings
            return dims * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(self.rope_theta))

        low = max(math.floor(pair_that_turns(self.beta_fast)), 0)
        high = min(math.ceil(pair_that_turns(self.beta_slow)), dims - 1)
        width = high - low or 0.001  # the published code's guard against a ramp of no width
        ramps = [min(max((pair - low) / width, 0.0), 1.0) for pair in range(len(plain))]
        return [
            1.0 / (ramp / (self.factor * each) + (1.0 - ramp) / each) for ramp, each in zip(ramps, plain, strict=True)
        ]


def read_llama_rope(raw: Mapping[str, Any], where: object, problems: list[CheckpointError]) -> LlamaRope:
    """Read rope_theta and rope_scaling, or transformers 5's `rope_parameters`; problems are appended to `problems`."""
    scaling: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        section = raw.get(key) or {}
        if isinstance(section, Mapping):
            scaling |= section
        else:
            problems.append(
                ConfigError(f"{key} has the wrong type", expected="an object", found=repr(section), where=where)
            )
    theta: Any = scaling.get("rope_theta") if raw.get("rope_theta") is None else raw["rope_theta"]
    if not is_number(theta, float) or theta <= 1:
        problems.append(
            ConfigError(
                "rope_theta is missing" if theta is None else "rope_theta is no base of a rope",
                expected="rope_theta over 1, or rope_parameters with one",
                found=None if theta is None else repr(theta),
                where=where,
                fix="copy config.json from the source: theta is never guessed",
            )
        )
        theta = 10_000.0
    kind = scaling.get("rope_type") or scaling.get("type") or ("default" if not scaling.get("factor") else None)
    if kind == "default":
        return LlamaRope(rope_theta=float(theta))
    if kind == "yarn" and "original_max_position_embeddings" not in scaling:
        scaling["original_max_position_embeddings"] = raw.get("max_position_embeddings")
    numbers = {key: scaling[key] for key in LlamaRope.__dataclass_fields__ if is_number(scaling.get(key), float)}
    missing = [key for key in _NEEDS.get(str(kind), ()) if not numbers.get(key, 0) > 0]
    if kind not in get_args(RopeKind) or missing:
        problems.append(
            ConfigError(
                "rope_scaling cannot be read",
                expected=f"type {', '.join(get_args(RopeKind))}, with its positive numbers",
                found=f"type {kind!r}" + (f", without {', '.join(missing)}" if missing else ""),
                where=where,
            )
        )
        return LlamaRope(rope_theta=float(theta))
    numbers.pop("rope_theta", None)
    if kind == "yarn" and "attention_factor" not in numbers and _mscales(scaling):
        up, down = (yarn_mscale(numbers["factor"], scaling[key]) for key in ("mscale", "mscale_all_dim"))
        numbers["attention_factor"] = up / down
    numbers = {key: float(value) for key, value in numbers.items()}
    return LlamaRope(rope_theta=float(theta), rope_type=cast(RopeKind, kind), **numbers)


def _mscales(scaling: Mapping[str, Any]) -> bool:
    return all(is_number(scaling.get(key), float) and scaling[key] > 0 for key in ("mscale", "mscale_all_dim"))
