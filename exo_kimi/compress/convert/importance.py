"""What inputs a module sees: mean squares of each input column, from a calibration file.

The file is a safetensors file: `<module path>` -> (in,) float32, or (E, in) for experts, each expert by the tokens that chose it.
A module that it lacks is measured as if all columns were alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.safetensors_io import read_header
from exo_kimi.checkpoint.text_files import read_bytes
from exo_kimi.errors import UsageError

Floats = NDArray[np.float32]

_LEAST_WORTH = 1e-6


def read_importance(path: Path, checkpoint: Checkpoint) -> Mapping[str, Floats]:
    """Mean squares by module path.

    Raises:
        UsageError: it cannot be read, or is of another model.
    """
    try:
        _, entries, problems = read_header(path)
        raw = read_bytes(path, most_bytes=2**34)
    except OSError as error:
        raise UsageError("cannot read the calibration", found=error.strerror, where=path) from None
    if problems:
        raise UsageError("cannot read the calibration", found=problems[0].what, where=path)
    shapes = {source.spec.path: source.spec.shape for source in checkpoint.manifest().sources}
    found: dict[str, Floats] = {}
    for entry in entries:
        shape = shapes.get(entry.name)
        fits = shape is not None and entry.shape in ((shape[-1],), (shape[0], shape[-1]))
        if not fits or entry.dtype != "F32":
            raise UsageError(
                f"the calibration is of another model: {entry.name}",
                expected=f"F32 ({shape[-1]},) or ({shape[0]}, {shape[-1]})" if shape else "a module of this checkpoint",
                found=entry.describe(),
                where=path,
            )
        values = np.frombuffer(raw[entry.start : entry.end], np.float32).reshape(entry.shape)
        if not np.isfinite(values).all() or (values < 0).any() or not values.any(-1).all():
            raise UsageError(
                f"the calibration has no mean squares for {entry.name}", found="NaN, negative or all zero", where=path
            )
        found[entry.name] = values
    return found


def read_worth(path: Path) -> Mapping[str, float]:
    """What errors of each module are worth, by path, from the file's metadata; empty where it has none.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        header, _, _ = read_header(path)
        stated = json.loads(json.loads(header).get("__metadata__", {}).get("worth", "{}"))
        return {str(name): max(float(value), _LEAST_WORTH) for name, value in stated.items()}
    except OSError as error:
        raise UsageError("cannot read the calibration", found=error.strerror, where=path) from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError("the calibration's worth cannot be read", found=error, where=path) from None
