"""Fingerprint of the weights of a layer range: equal on two machines with the same weights, however the files are cut and named.

Shapes alone would not do: K2-Instruct and K2-Instruct-0905 have the same. So the bytes of the range's norms count too, some
30 KB a layer, which any fine-tuning changes.
"""

from __future__ import annotations

import hashlib
import os

from exo_kimi.checkpoint.index import TensorEntry
from exo_kimi.checkpoint.manifest import StageManifest, not_here
from exo_kimi.checkpoint.text_files import open_regular
from exo_kimi.errors import TensorFileError


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
                    digest.update(_read(manifest, entry))
    return digest.hexdigest()


def _read(manifest: StageManifest, entry: TensorEntry) -> bytes:
    path = manifest.directory / entry.file
    if not entry.is_here:
        raise not_here(manifest.directory, (entry,))
    try:
        with os.fdopen(open_regular(path), "rb") as stream:
            stream.seek(entry.start)
            return stream.read(entry.nbytes)
    except OSError as error:
        raise TensorFileError(f"{entry.name} cannot be read", found=error.strerror, where=path) from error
