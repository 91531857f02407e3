"""The files of a checkpoint directory that tensors are read from: opened when first needed, and what is said when they fail."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from exo_kimi.checkpoint.safetensors_io import TensorEntry
from exo_kimi.checkpoint.text_files import open_regular
from exo_kimi.errors import TensorFileError


class TensorFiles:
    """Open files of one checkpoint directory; safe to use from several threads.

    Args:
        directory: the checkpoint.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def descriptor(self, entry: TensorEntry) -> int:
        """Of the file that a tensor lies in.

        Raises:
            TensorFileError: it is gone or cannot be read.
        """
        with self._lock:
            if entry.file not in self._descriptors:
                try:
                    self._descriptors[entry.file] = open_regular(self.directory / entry.file)
                except OSError as failure:
                    raise self.unreadable(entry, failure) from failure
            return self._descriptors[entry.file]

    def close(self) -> None:
        """Close all of them."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def unreadable(self, entry: TensorEntry, failure: OSError) -> TensorFileError:
        """The error of a tensor that the system does not read."""
        where = self.directory / entry.file
        return TensorFileError(f"cannot read {entry.name}", found=failure.strerror or failure, where=where)

    def cut(self, entry: TensorEntry, position: int) -> TensorFileError:
        """The error of a tensor whose file ends at `position`, inside of it."""
        return TensorFileError(
            f"{entry.file} ends inside {entry.name}",
            expected=f"{entry.end:,} bytes, as its header said when the index was read",
            found=f"{position:,} bytes",
            where=self.directory / entry.file,
            fix="the file was cut or replaced in between: download or copy it again",
        )
