"""The vision tower and its projector from a checkpoint into memory, with nothing left over."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from exo_kimi.checkpoint.index import TensorEntry, open_index
from exo_kimi.checkpoint.vision import NoVision, VisionManifest, find_vision
from exo_kimi.errors import NotACheckpointError
from exo_kimi.models.vision import VisionModel
from exo_kimi.runtime.loading.filling import FLOATS
from exo_kimi.runtime.loading.loader import DTYPES, check_dtype
from exo_kimi.runtime.loading.tensor_reader import TensorReader

_WORDS = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}


def load_vision(path: str | Path, *, dtype: str | None = None) -> VisionModel:
    """Load the tower of a checkpoint directory.

    Args:
        path: the directory.
        dtype: of the weights; None keeps what is stored.

    Raises:
        NotACheckpointError: there is none.
        CheckpointError: see `find_vision`.
        UsageError: an unknown dtype.
    """
    found = find_vision(open_index(Path(path)))
    if isinstance(found, NoVision):
        raise NotACheckpointError(found.reason, where=path)
    return load_tower(found, dtype=dtype)


def load_tower(manifest: VisionManifest, *, dtype: str | None = None) -> VisionModel:
    """Build tower and projector and fill them; at most one tensor is held twice meanwhile.

    Args:
        manifest: where the tensors lie.
        dtype: of the weights; None keeps what is stored.

    Raises:
        TensorFileError: a file changed since its header was read.
        UsageError: an unknown dtype.
    """
    check_dtype(dtype)
    model = VisionModel(manifest.config)
    with TensorReader(manifest.directory) as reader:
        for name in [path for path, _ in tree_flatten(model.parameters())]:
            _set(model, name, _read(reader, manifest.entries[name], DTYPES[dtype] if dtype else None))
    model.eval()
    return model


def _read(reader: TensorReader, entry: TensorEntry, dtype: mx.Dtype | None) -> mx.array:
    words = np.frombuffer(reader.read(entry), _WORDS[entry.dtype]).reshape(entry.shape)
    array = mx.array(words)
    array = array.view(mx.bfloat16) if entry.dtype == "BF16" else array
    array = array.astype(dtype or FLOATS[entry.dtype])
    mx.eval(array)
    return array


def _set(model: nn.Module, name: str, value: mx.array) -> None:
    path, _, leaf = name.rpartition(".")
    module = model
    for part in path.split("."):
        module = module[int(part)] if isinstance(module, list) else module[part]
    module[leaf] = value
