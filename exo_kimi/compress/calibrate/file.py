"""The file of a calibration, SCORES.json: sums by expert and layer, strictly read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from exo_kimi.checkpoint.text_files import read_json
from exo_kimi.compress.calibrate.measures import EXPERT_FIELDS, LayerMeasures, Measured
from exo_kimi.errors import UsageError

VERSION = 1


def measured_to_json(measured: Measured) -> str:
    """The text of SCORES.json."""
    layers = [
        {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in asdict(layer).items()}
        for layer in measured.layers
    ]
    head = {
        "version": VERSION,
        "fingerprint": measured.fingerprint,
        "chosen": measured.chosen,
        "tokens": measured.tokens,
        "texts": measured.texts,
        "domain": measured.domain,
        "files": list(measured.files),
    }
    return json.dumps({**head, "layers": layers}) + "\n"


def read_measured(path: Path) -> Measured:
    """Read SCORES.json.

    Raises:
        UsageError: no such file, or it is not one of `exo-kimi calibrate`.
    """
    try:
        raw = read_json(path)
        if raw["version"] != VERSION:
            raise ValueError(f"version {raw['version']}")
        return Measured(
            fingerprint=str(raw["fingerprint"]),
            chosen=int(raw["chosen"]),
            tokens=int(raw["tokens"]),
            texts=int(raw["texts"]),
            domain=str(raw["domain"]),
            files=tuple(str(name) for name in raw["files"]),
            layers=tuple(_layer(each) for each in raw["layers"]),
        )
    except OSError as error:
        raise UsageError("the scores cannot be read", found=error.strerror, where=path) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            "not a file of scores",
            expected=f"what `exo-kimi calibrate` writes, version {VERSION}",
            found=f"{type(error).__name__}: {error}",
            where=path,
            fix="calibrate again",
        ) from None


def _layer(raw: Mapping[str, Any]) -> LayerMeasures:
    arrays = {name: np.array(raw[name], np.float64) for name in EXPERT_FIELDS}
    if len({array.shape for array in arrays.values()}) != 1 or not all(np.isfinite(a).all() for a in arrays.values()):
        raise ValueError("a layer's numbers are not finite, or not one for each expert")
    return LayerMeasures(**arrays, energy=float(raw["energy"]), turned=float(raw["turned"]), seen=int(raw["seen"]))
