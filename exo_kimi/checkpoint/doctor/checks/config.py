"""Check config.json: whether it is a Kimi's, and which model_type it should name."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.keys import EXPERTS_PER_LAYER
from exo_kimi.checkpoint.doctor.findings import Checkup
from exo_kimi.checkpoint.keys import TensorKey, has_prefix, parse_key
from exo_kimi.checkpoint.text_files import CONFIG_NAME, read_bytes, read_config
from exo_kimi.errors import CheckpointError, CheckpointProblems, ConfigError, UnsupportedModelError

# Only the routers of DeepSeek-V3 and of Kimi have it; those of DeepSeek-V2 do not.
_KIMI_PART = ".e_score_correction_bias"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigReading:
    """config.json with a model_type that fits, its architecture, and how it differs from the file, in words."""

    raw: Mapping[str, Any]
    config: KimiConfig
    changes: tuple[str, ...] = ()


def check_config(root: Path, names: Collection[str], checkup: Checkup) -> ConfigReading | None:
    """Note every finding about the keys of config.json.

    Args:
        root: the checkpoint.
        names: the names of all tensors, which show what a wrong model_type should be.
        checkup: gets the findings.

    Returns:
        None when no architecture can be told.
    """
    try:
        raw = read_config(root)
    except CheckpointError as error:
        checkup.error(error)
        return None
    reading = _read(raw, names, checkup)
    if reading is not None and read_bytes(root / CONFIG_NAME).startswith(codecs.BOM_UTF8):
        checkup.warn(
            ConfigError(
                "config.json begins with a byte order mark",
                where=CONFIG_NAME,
                fix="exo-kimi reads it; mlx-lm and exo do not",
            ),
            fixable=True,
        )
        reading = replace(reading, changes=(*reading.changes, "the byte order mark in front: removed"))
    if reading is not None:
        _check_prefix(reading.config, names, checkup)
        _check_context(reading, checkup)
        _check_ids(reading, checkup)
        _check_experts(reading.config, checkup)
    return reading


def _read(raw: dict[str, Any], names: Collection[str], checkup: Checkup) -> ConfigReading | None:
    try:
        return ConfigReading(raw=raw, config=KimiConfig.from_dict(raw, where=CONFIG_NAME))
    except CheckpointProblems as error:
        problems = error.problems
    except CheckpointError as error:
        problems = (error,)
    mended = _with_model_type(raw) if any(name.endswith(_KIMI_PART) for name in names) else None
    if mended is None:
        for problem in problems:
            checkup.error(problem)
        return None
    change = f"model_type: {_model_types(raw)} -> {_model_types(mended.raw)}"
    kind = UnsupportedModelError if isinstance(problems[0], UnsupportedModelError) else ConfigError
    checkup.error(
        kind(
            "model_type is wrong: the other keys and the tensors are a Kimi K2's",
            expected=_model_types(mended.raw),
            found=_model_types(raw),
            where=CONFIG_NAME,
            fix="copy config.json from the source, or let --fix write it",
        ),
        fixable=True,
    )
    return ConfigReading(raw=mended.raw, config=mended.config, changes=(change,))


def _with_model_type(raw: dict[str, Any]) -> ConfigReading | None:
    """The config under the model_type that makes it a valid one, nested or flat as its keys lie."""
    text = raw.get("text_config")
    nested = {**text, "model_type": "kimi_k2"} if isinstance(text, dict) else None
    candidates = [] if nested is None else [{**raw, "model_type": "kimi_k25", "text_config": nested}]
    for candidate in (*candidates, {**raw, "model_type": "kimi_k2"}):
        try:
            return ConfigReading(raw=candidate, config=KimiConfig.from_dict(candidate, where=CONFIG_NAME))
        except CheckpointError:
            continue  # the findings are those of the file as it is
    return None


def _model_types(raw: Mapping[str, Any]) -> str:
    text = raw.get("text_config")
    inner = f" with text_config {text.get('model_type')!r}" if isinstance(text, Mapping) else ""
    return f"{raw.get('model_type')!r}{inner}"


def _check_prefix(config: KimiConfig, names: Collection[str], checkup: Checkup) -> None:
    nested = bool(config.key_prefix)
    odd = [name for name in names if has_prefix(name) != nested and isinstance(parse_key(name), TensorKey)]
    if odd:
        text_names = [name for name in names if isinstance(parse_key(name), TensorKey)]
        said = "nested (kimi_k25)" if nested else f"flat ({config.model_type})"
        checkup.warn(
            ConfigError(
                "config.json and the tensor names nest the text model differently",
                expected=f"names {'with' if config.key_prefix else 'without'} language_model., since config.json is {said}",
                found=f"{len(odd):,} of {len(text_names):,} names are otherwise, {odd[0]} first",
                where=CONFIG_NAME,
                fix="exo-kimi reads both; for other programs, take config.json and weights from one source",
            )
        )


def _check_context(reading: ConfigReading, checkup: Checkup) -> None:
    config = reading.config
    scaling = config.rope_scaling
    if scaling is None:
        return
    reach = scaling.factor * scaling.original_max_position_embeddings
    if reach != config.max_position_embeddings:
        checkup.warn(
            ConfigError(
                "rope_scaling and max_position_embeddings disagree",
                expected=f"max_position_embeddings {reach:,.0f} = factor {scaling.factor:g} * "
                f"{scaling.original_max_position_embeddings}, as in every Kimi K2",
                found=f"max_position_embeddings {config.max_position_embeddings:,}",
                where=CONFIG_NAME,
                fix="compare with config.json of the source",
            )
        )


def _check_experts(config: KimiConfig, checkup: Checkup) -> None:
    if not config.is_even:
        checkup.warn(
            ConfigError(
                "layers have different numbers of experts, which exo-kimi alone reads",
                expected="one n_routed_experts for all layers, which mlx-lm and exo's own engine build every layer by",
                found=f"{EXPERTS_PER_LAYER}, {min(filter(None, config.n_routed_experts_per_layer or ()))} to "
                f"{config.n_routed_experts}",
                where=CONFIG_NAME,
                fix="serve it with exo-kimi, in exo with its engine; for others, prune the original without --budgeted",
            )
        )


def _check_ids(reading: ConfigReading, checkup: Checkup) -> None:
    vocab_size = reading.config.vocab_size
    text = reading.raw["text_config"] if reading.config.key_prefix else reading.raw
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = text.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        odd = [token for token in ids if type(token) is not int or not 0 <= token < vocab_size]
        if odd:
            checkup.warn(
                ConfigError(
                    f"{key} is no row of the embedding",
                    expected=f"an id below vocab_size {vocab_size}",
                    found=ascii(odd[0]),
                    where=CONFIG_NAME,
                    fix="exo-kimi does not use it; other programs may",
                )
            )
