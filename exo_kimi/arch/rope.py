"""Rotary position parameters, in the spelling of `rope_scaling` and in that of transformers 5's `rope_parameters`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exo_kimi.arch.numbers import is_number
from exo_kimi.errors import CheckpointError, ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Yarn parameters. Source: config.json `rope_scaling`; "YaRN", Peng et al. 2023; DeepSeek-V3 for mscale."""

    factor: float
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float
    original_max_position_embeddings: int


def yarn_mscale(factor: float, mscale: float) -> float:
    """Yarn's attention temperature, 0.1 * mscale * ln(factor) + 1, or 1 where nothing is stretched."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 and mscale else 1.0


def read_rope(
    text: Mapping[str, Any], where: object, problems: list[CheckpointError]
) -> tuple[float | None, RopeScaling | None]:
    """Read rope_theta and rope_scaling, or transformers 5's `rope_parameters`, which replaces both.

    Where a config has both spellings, they must agree; problems are appended to `problems`.
    """
    merged = _section(text, "rope_parameters", where, problems)
    theta = text.get("rope_theta", merged.get("rope_theta"))
    own = _section(text, "rope_scaling", where, problems)
    scaling = own or merged
    if not is_number(theta, float) or theta <= 0:
        problems.append(
            ConfigError(
                "rope_theta is missing" if theta is None else "rope_theta is not a positive number",
                expected="rope_theta, or rope_parameters with a rope_theta (50000 in every Kimi K2)",
                found=None if theta is None else repr(theta),
                where=where,
                fix="copy config.json from the source: theta is never guessed",
            )
        )
        theta = None
    _agree({"rope_theta": theta, **own}, merged, where, problems)
    kind = _kind(scaling)
    if kind == "default":
        return theta, None
    keys = RopeScaling.__dataclass_fields__
    missing = [key for key in keys if not is_number(scaling.get(key), float)]
    wrong = [key for key in keys if key not in missing and not (scaling[key] > 0 or key.startswith("mscale"))]
    if kind != "yarn" or missing or wrong:
        problems.append(
            ConfigError(
                "rope_scaling cannot be read",
                expected=f"type yarn with the numbers {', '.join(keys)}, positive ones",
                found=f"type {kind!r}"
                + (f", without {', '.join(missing)}" if missing else "")
                + "".join(f", {key} {scaling[key]}" for key in wrong),
                where=where,
            )
        )
        return theta, None
    return theta, RopeScaling(**{key: scaling[key] for key in keys})


def _section(text: Mapping[str, Any], key: str, where: object, problems: list[CheckpointError]) -> Mapping[str, Any]:
    section = text.get(key) or {}
    if isinstance(section, Mapping):
        return section
    problems.append(ConfigError(f"{key} has the wrong type", expected="an object", found=repr(section), where=where))
    return {}


def _kind(scaling: Mapping[str, Any]) -> object:
    """The rope type; None where yarn's numbers have none: taking them for plain rope would answer fluently and wrongly."""
    stated = scaling.get("rope_type") or scaling.get("type")
    return stated or (None if scaling.keys() & RopeScaling.__dataclass_fields__.keys() else "default")


def _agree(own: Mapping[str, Any], merged: Mapping[str, Any], where: object, problems: list[CheckpointError]) -> None:
    """Note a problem where the two spellings differ: one of them would silently win."""
    shared = [key for key in ("rope_theta", *RopeScaling.__dataclass_fields__) if key in own and key in merged]
    differing = [key for key in shared if own[key] is not None and own[key] != merged[key]]
    if len(own) > 1 and merged and _kind(own) != _kind(merged):
        differing.append("rope_type")
    if differing:
        problems.append(
            ConfigError(
                "rope_parameters contradicts rope_theta or rope_scaling",
                expected=", ".join(f"{key} {own.get(key, _kind(own))}" for key in differing),
                found=", ".join(f"{key} {merged.get(key, _kind(merged))}" for key in differing),
                where=where,
                fix="copy config.json from the source",
            )
        )
