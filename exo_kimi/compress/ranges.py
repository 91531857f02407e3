"""Byte ranges of a checkpoint's files, read from several threads at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exo_kimi.checkpoint.safetensors_io import TensorEntry
from exo_kimi.checkpoint.text_files import open_regular
from exo_kimi.errors import TensorFileError

BLOCK_BYTES = 4 * 2**20
"""Most bytes of a piece."""


class RangeReader:
    """Open files of one checkpoint directory. A context manager; safe to use from several threads.

    Args:
        directory: the checkpoint.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> RangeReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, entry: TensorEntry, first: int = 0, count: int | None = None) -> NDArray[np.uint8]:
        """Bytes of a tensor, into memory of their own.

        Args:
            entry: the tensor.
            first: first byte, inside the tensor.
            count: how many; to its end when not given.

        Raises:
            TensorFileError: the file is gone, cannot be read, or is shorter than its header said.
        """
        data = np.empty(entry.nbytes - first if count is None else count, np.uint8)
        descriptor, rest, position = self._descriptor(entry), data.data, entry.start + first
        while len(rest):
            try:
                done = os.preadv(descriptor, [rest], position)
            except OSError as failure:
                raise self._unreadable(entry, failure) from failure
            if done == 0:
                raise TensorFileError(
                    f"{entry.file} ends inside {entry.name}",
                    expected=f"{entry.end:,} bytes, as its header said when the index was read",
                    found=f"{position:,} bytes",
                    where=self.directory / entry.file,
                    fix="the file was cut or replaced in between: download or copy it again",
                )
            rest, position = rest[done:], position + done
        return data

    def pieces(self, entry: TensorEntry, first: int = 0, count: int | None = None) -> Iterator[tuple[int, Any]]:
        """The same bytes in pieces of at most `BLOCK_BYTES`, each with its distance from `first`.

        Raises:
            TensorFileError: as `read`.
        """
        total = entry.nbytes - first if count is None else count
        for position in range(0, total, BLOCK_BYTES):
            yield position, self.read(entry, first + position, min(BLOCK_BYTES, total - position))

    def _descriptor(self, entry: TensorEntry) -> int:
        with self._lock:
            if entry.file not in self._descriptors:
                try:
                    self._descriptors[entry.file] = open_regular(self.directory / entry.file)
                except OSError as failure:
                    raise self._unreadable(entry, failure) from failure
            return self._descriptors[entry.file]

    def _unreadable(self, entry: TensorEntry, failure: OSError) -> TensorFileError:
        return TensorFileError(
            f"cannot read {entry.name}", found=failure.strerror or failure, where=self.directory / entry.file
        )
