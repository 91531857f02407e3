"""Byte ranges of a checkpoint's files, read from several threads at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exo_kimi.checkpoint.safetensors_io import TensorEntry
from exo_kimi.checkpoint.tensor_files import TensorFiles

BLOCK_BYTES = 4 * 2**20
"""Most bytes of a piece."""


class RangeReader:
    """Open files of one checkpoint directory. A context manager; safe to use from several threads.

    Args:
        directory: the checkpoint.
    """

    def __init__(self, directory: Path) -> None:
        self._files = TensorFiles(directory)

    def __enter__(self) -> RangeReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

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
        descriptor, rest, position = self._files.descriptor(entry), data.data, entry.start + first
        while len(rest):
            try:
                done = os.preadv(descriptor, [rest], position)
            except OSError as failure:
                raise self._files.unreadable(entry, failure) from failure
            if done == 0:
                raise self._files.cut(entry, position)
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
