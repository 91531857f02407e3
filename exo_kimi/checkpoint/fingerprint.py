"""Fingerprints of weights, of a layer range's or a vision tower's: equal where the weights are, however the files are cut.

Shapes alone would not do: K2-Instruct and K2-Instruct-0905 have the same. So the bytes of the range's norms count too, some
30 KB a layer, which any fine-tuning changes.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from exo_kimi.checkpoint.index import TensorEntry
from exo_kimi.checkpoint.manifest import StageManifest, not_here
from exo_kimi.checkpoint.packing import restore, store
from exo_kimi.checkpoint.safetensors_io import StoredTensor
from exo_kimi.checkpoint.text_files import open_regular
from exo_kimi.checkpoint.vision import VisionManifest
from exo_kimi.errors import TensorFileError

_WORDS = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
_HEAD_BYTES = 4_096
"""Of each tensor of a tower: norms and biases whole or nearly, and a few rows of what is larger; 1.3 MB of K2.5's."""


def stage_fingerprint(manifest: StageManifest) -> str:
    """Hash of the architecture, and of every tensor's module, part, dtype and shape, and of the norms' bytes.

    Raises:
        TensorFileError: a file cannot be read.
        MissingTensorError: the directory is a share without the norms.
    """
    digest = hashlib.sha256(repr(manifest.config).encode())
    for source in manifest.sources:
        for part, entries in sorted(source.parts.items()):
            described = [(entry.dtype, entry.shape) for entry in entries]
            digest.update(f"\n{source.spec.path} {part} {described}".encode())
            if source.spec.kind == "norm":
                for entry in entries:
                    digest.update(_read(manifest.directory, entry, entry.nbytes))
    return digest.hexdigest()


def norms_fingerprint(manifest: StageManifest) -> str:
    """Hash of the norms' values in bfloat16: one for a model in whatever layout and bits, as norms are never quantized, and
    another for another training of the same architecture.

    Raises:
        TensorFileError: a file cannot be read.
        MissingTensorError: the directory is a share without the norms.
    """
    digest = hashlib.sha256()
    for source in manifest.sources:
        if source.spec.kind == "norm":
            (entry,) = source.parts["weight"]
            raw = np.frombuffer(_read(manifest.directory, entry, entry.nbytes), _WORDS[entry.dtype])
            values = restore(StoredTensor(entry.dtype, raw))
            digest.update(source.spec.path.encode() + store(values, "BF16").data.astype("<u2").tobytes())
    return digest.hexdigest()


def tower_fingerprint(manifest: VisionManifest) -> str:
    """Hash of a tower's configuration, and of every tensor's name, dtype, shape and first bytes.

    Raises:
        TensorFileError: a file cannot be read.
    """
    digest = hashlib.sha256(repr(manifest.config).encode())
    for name, entry in sorted(manifest.entries.items()):
        digest.update(f"\n{name} {entry.dtype} {entry.shape}".encode())
        digest.update(_read(manifest.directory, entry, min(entry.nbytes, _HEAD_BYTES)))
    return digest.hexdigest()


def _read(directory: Path, entry: TensorEntry, nbytes: int) -> bytes:
    path = directory / entry.file
    if not entry.is_here:
        raise not_here(directory, (entry,))
    try:
        with os.fdopen(open_regular(path), "rb") as stream:
            stream.seek(entry.start)
            return stream.read(nbytes)
    except OSError as error:
        raise TensorFileError(f"{entry.name} cannot be read", found=error.strerror, where=path) from error
