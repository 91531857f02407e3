"""config.json and the card of a converted checkpoint."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from exo_kimi.checkpoint.hints import SECTIONS
from exo_kimi.checkpoint.quantization import QuantSpec

_STALE = (*SECTIONS, "compression_config")
_DTYPE_KEYS = ("torch_dtype", "dtype")
_DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16"}


def config_text(raw: Mapping[str, Any], packings: Mapping[str, QuantSpec | None], *, dtype: str | None = None) -> str:
    """config.json of the source with the bits of each module, as mlx-lm writes and reads them.

    Args:
        raw: the source's.
        packings: by full path, None for a module that could be packed and is not.
        dtype: of the plain weights, where it may have changed: `BF16` or `F16`.
    """
    config = _without(raw)
    if isinstance(config.get("text_config"), Mapping):
        config["text_config"] = _without(config["text_config"])
    for scope in (config, config.get("text_config")):
        for key in _DTYPE_KEYS:
            if isinstance(scope, dict) and dtype is not None and isinstance(scope.get(key), str):
                scope[key] = _DTYPE_NAMES[dtype]
    section = quantization_section(packings)
    if section:
        config["quantization"] = config["quantization_config"] = section
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def quantization_section(packings: Mapping[str, QuantSpec | None]) -> dict[str, Any]:
    """The section: what most modules have, and an entry for each other one; empty where nothing is packed."""
    counts = Counter(packing for packing in packings.values() if packing is not None)
    if not counts:
        return {}
    common = max(counts, key=lambda packing: (counts[packing], packing.bits, packing.group_size))
    section: dict[str, Any] = _entry(common)
    for path, packing in packings.items():
        if packing is None:
            section[path] = False
        elif packing != common:
            section[path] = _entry(packing)
    return section


def card_text(name: str, lines: Iterable[str]) -> str:
    """README.md: what the checkpoint is, for who finds it."""
    facts = "\n".join(f"- {line}" for line in lines)
    return (
        "---\nlibrary_name: mlx\ntags:\n- mlx\npipeline_tag: text-generation\n---\n\n"
        f"# {name}\n\nMade by [exo-kimi](https://pypi.org/project/exo-kimi/). It runs in exo-kimi, mlx-lm and exo.\n\n{facts}\n"
    )


def _entry(packing: QuantSpec) -> dict[str, Any]:
    return {"group_size": packing.group_size, "bits": packing.bits, "mode": packing.mode}


def _without(scope: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in scope.items() if key not in _STALE}
