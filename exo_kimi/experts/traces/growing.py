"""The file of a trace that is still being recorded: it is right after every pass, however its writer ends.

A line of JSON says what the trace is of; each pass is then its number of tokens N as a uint32, and M x N x K experts as uint16,
all little-endian. A pass that was cut in the middle is left out.
"""

from __future__ import annotations

import errno
import fcntl
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from exo_kimi.errors import UsageError

MAGIC = b'{"exo_kimi_expert_trace":'
VERSION = 1
MOST_HEADER_BYTES = 1 << 20


class GrowingTrace:
    """Writes passes to the end of a file.

    Args:
        file: open for that, with its header.
        layers: M.
        chosen: K.
    """

    def __init__(self, file: BinaryIO, *, layers: int, chosen: int) -> None:
        self._file = file
        self._form = (layers, chosen)

    @classmethod
    def open(cls, path: Path, *, experts: int, chosen: int, layers: Sequence[int], source: str) -> Self:
        """Begin a file, or go on with one that has the same header, as of a stage that started again.

        Args:
            path: of the file.
            experts: of a layer.
            chosen: of a token.
            layers: numbers of the layers.
            source: what is traced, for people.

        Raises:
            OSError: it cannot be written, or another process writes it.
        """
        header = {"exo_kimi_expert_trace": VERSION, "experts": experts, "chosen": chosen, "layers": list(layers)}
        line = json.dumps({**header, "source": source}, separators=(",", ":")).encode() + b"\n"
        file = _locked(path)
        if file.read(len(line)) == line:
            file.seek(_end_of_passes(path, len(line), 2 * chosen * len(layers)))
        else:
            file.seek(0)
            file.write(line)
        file.truncate()
        return cls(file, layers=len(layers), chosen=chosen)

    def add(self, ids: NDArray[Any]) -> None:
        """A pass: (M, N, K) experts.

        Raises:
            OSError: it cannot be written.
        """
        layers, tokens, chosen = ids.shape
        if (layers, chosen) != self._form:
            raise ValueError(f"a pass of {ids.shape}, expected {self._form[0]} layers and {self._form[1]} experts")
        data = np.uint32(tokens).astype("<u4").tobytes() + ids.astype("<u2").tobytes()
        self._file.write(data)

    def close(self) -> None:
        """Nothing more comes."""
        self._file.close()


def trace_file(path: Path, stage: int, stages: int) -> Path:
    """Where a stage writes its part of a trace: `chat.trace` becomes `chat.stage-0.trace`, and so on."""
    return path if stages == 1 else path.with_name(f"{path.stem}.stage-{stage}{path.suffix}")


def begin_file(path: Path) -> None:
    """Make the empty file of a trace to come.

    Raises:
        OSError: it cannot be written, or another process writes it.
    """
    with _locked(path) as file:
        file.truncate()


def _locked(path: Path) -> BinaryIO:
    """A file, made if there is none, that nobody else writes until it is closed: passes of two processes make no trace."""
    with path.open("ab") as _:
        pass
    file = path.open("r+b", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        raise OSError(error.errno, "another process writes it", str(path)) from None
    return file


def read_growing(path: Path) -> dict[str, Any]:
    """The arguments of an `ExpertTrace`, not checked.

    Raises:
        UsageError: the file is none of these, or of another version, or holds no pass.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        line = file.readline(MOST_HEADER_BYTES)
    try:
        header = json.loads(line)
        version, experts, chosen = (int(header[key]) for key in ("exo_kimi_expert_trace", "experts", "chosen"))
        layers = tuple(int(layer) for layer in header["layers"])
        source = str(header["source"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError("a file that is no trace", found=str(error) or type(error).__name__, where=path) from None
    if version != VERSION:
        raise UsageError(
            "a trace of another version", expected=VERSION, found=version, where=path, fix="record it again"
        )
    words = np.fromfile(path, "<u2", offset=len(line))
    passes, calls, start = [], [], 0
    while start + 2 <= len(words):
        tokens = int(words[start]) | int(words[start + 1]) << 16
        size = len(layers) * tokens * chosen
        if not size or start + 2 + size > len(words):
            break
        passes.append(words[start + 2 : start + 2 + size].reshape(len(layers), tokens, chosen))
        calls.append(tokens)
        start += 2 + size
    if not passes:
        raise UsageError("a trace without tokens", fix="it grows as the server answers", where=path)
    ids = np.concatenate(passes, axis=1)
    return {
        "ids": ids,
        "experts": experts,
        "layers": layers,
        "calls": np.array(calls, np.int32),
        "source": source,
    }


def _end_of_passes(path: Path, start: int, token_bytes: int) -> int:
    """Where the last whole pass of a file ends."""
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        while start + 4 <= size_bytes:
            file.seek(start)
            end = start + 4 + int.from_bytes(file.read(4), "little") * token_bytes
            if end > size_bytes:
                break
            start = end
    return start
