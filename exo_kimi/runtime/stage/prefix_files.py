"""Blocks of caches as files: one safetensors file each, checksummed, whole or not there. It knows no threads and no budget.

A file is written under another name, synced, and renamed, so that a process that dies leaves no half block under a block's
name; what is damaged in other ways (or was, before the rename reached the disk) does not match its checksum.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exo_kimi.checkpoint.safetensors_io import StoredTensor, read_header, write_file
from exo_kimi.runtime.prefix_key import is_key

SUFFIX, UNFINISHED = ".safetensors", ".part"
UNUSED_S = 30 * 24 * 3600.0
"""After so long without a server, the blocks of another model, split or dtype are deleted."""
_ELEMENTS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U32": "<u4", "U8": "u1"}


class DamagedBlockError(Exception):
    """A block's file is missing, incomplete, changed, or another's; it never leaves the stage."""


@dataclass(frozen=True, slots=True)
class BlockFiles:
    """The files of one stage.

    Args:
        directory: holds them and nothing else; made if missing.
        identity: of the caches, part of each file's checksum.
    """

    directory: Path
    identity: str

    def prepare(self) -> list[str]:
        """Keys of the files that are there, the one that was not used for longest first; unfinished files are deleted.

        Raises:
            OSError: the directory cannot be made or listed.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        os.utime(self.directory)
        found: list[tuple[float, str]] = []
        for entry in os.scandir(self.directory):
            with contextlib.suppress(FileNotFoundError):  # another server may share the directory
                if entry.name.endswith(UNFINISHED):
                    Path(entry.path).unlink()
                elif is_key(key := entry.name.removesuffix(SUFFIX)):
                    found.append((entry.stat().st_mtime, key))
        return [key for _, key in sorted(found)]

    def write(self, key: str, tensors: Mapping[str, StoredTensor]) -> None:
        """Write one block.

        Raises:
            OSError: the disk is full, or gone.
        """
        unfinished = self.directory / f"{key}-{os.getpid()}{UNFINISHED}"
        try:
            write_file(unfinished, tensors, metadata={"checksum": self._checksum(key, tensors)})
            with unfinished.open("rb+") as stream:
                os.fsync(stream.fileno())
            unfinished.replace(self._path(key))
        except BaseException:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise

    def read(self, key: str) -> dict[str, StoredTensor]:
        """One block, which counts as used now.

        Raises:
            DamagedBlockError: it is not what was written.
        """
        path = self._path(key)
        header, entries, problems = read_header(path)
        if problems:
            raise DamagedBlockError(str(problems[0]))
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError as error:
            raise DamagedBlockError(f"{path}: {error.strerror}") from error
        tensors = {}
        for entry in entries:
            if entry.dtype not in _ELEMENTS or entry.end > len(data):
                raise DamagedBlockError(f"{path}: {entry.name} is {entry.describe()}")
            values = np.frombuffer(data, _ELEMENTS[entry.dtype], entry.nbytes // _size(entry.dtype), entry.start)
            tensors[entry.name] = StoredTensor(entry.dtype, values.reshape(entry.shape))
        metadata = json.loads(header).get("__metadata__")
        if not isinstance(metadata, dict) or metadata.get("checksum") != self._checksum(key, tensors):
            raise DamagedBlockError(f"{path}: the checksum is not that of the contents")
        return tensors

    def delete(self, key: str) -> None:
        """Delete a block; that it is gone already is well."""
        with contextlib.suppress(OSError):
            self._path(key).unlink()

    def delete_unused_siblings(self) -> None:
        """Delete the directories beside this one that hold blocks nobody came for."""
        for sibling in self.directory.parent.iterdir():
            with contextlib.suppress(OSError):
                old = time.time() - sibling.stat().st_mtime > UNUSED_S
                if old and is_key(sibling.name) and sibling != self.directory:
                    shutil.rmtree(sibling)

    def _path(self, key: str) -> Path:
        return self.directory / f"{key}{SUFFIX}"

    def _checksum(self, key: str, tensors: Mapping[str, StoredTensor]) -> str:
        digest = hashlib.sha256(f"{self.identity} {key}".encode())
        for name, tensor in sorted(tensors.items()):
            digest.update(f"\n{name} {tensor.dtype} {tensor.data.shape}\n".encode())
            digest.update(np.ascontiguousarray(tensor.data).data)
        return digest.hexdigest()


def _size(dtype: str) -> int:
    return np.dtype(_ELEMENTS[dtype]).itemsize
