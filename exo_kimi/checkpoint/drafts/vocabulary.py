"""Which tokens of its target a head drafts: `d2t`, stored as the target's id less the head's own, and `t2d`, which marks them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exo_kimi.checkpoint.index import TensorEntry
from exo_kimi.checkpoint.tensor_files import TensorFiles
from exo_kimi.errors import CheckpointError, ConfigError

Integers = NDArray[np.int64]
_WORDS: dict[str, type[np.generic]] = {"I64": np.int64, "I32": np.int32, "U8": np.uint8, "BOOL": np.uint8}
_PIECE_BYTES = 2**20
_FIX = "copy the head again; `d2t` is the target's id less the head's own, and is added once"


def read_integers(root: Path, entry: TensorEntry) -> Integers:
    """A vector of integers or truth values.

    Raises:
        TensorFileError: its file is gone, cannot be read, or ends inside of it.
    """
    words: NDArray[Any] = np.frombuffer(read_bytes_of(root, entry, 0, entry.nbytes), _WORDS[entry.dtype])
    return words.astype(np.int64)


def read_bytes_of(root: Path, entry: TensorEntry, skip_bytes: int, count: int) -> bytes:
    """So many bytes of a tensor, from `skip_bytes` on.

    Raises:
        TensorFileError: its file is gone, cannot be read, or ends inside of it.
    """
    files, data = TensorFiles(root), bytearray()
    try:
        descriptor = files.descriptor(entry)
        while len(data) < count:
            position = entry.start + skip_bytes + len(data)
            try:
                piece = os.pread(descriptor, min(_PIECE_BYTES, count - len(data)), position)
            except OSError as failure:
                raise files.unreadable(entry, failure) from failure
            if not piece:
                raise files.cut(entry, position)
            data += piece
    finally:
        files.close()
    return bytes(data)


def target_ids(differences: Integers) -> Integers:
    """The target's id of every token of the head: the difference is added once."""
    return np.arange(len(differences)) + differences


def check_vocabulary(
    differences: Integers, chosen: Integers | None, *, vocab_size: int, where: object
) -> list[CheckpointError]:
    """What is wrong with a vocabulary.

    Ids that were added already look like this: they ascend by at least one everywhere, where true differences repeat wherever two
    tokens that follow one another are both drafted, and added again they leave the vocabulary or are not those of `t2d`.

    Args:
        differences: `d2t`.
        chosen: `t2d`, where the head has it: of every id of the target whether it is drafted.
        vocab_size: of the target.
        where: for errors.
    """
    ids = target_ids(differences)
    problems: list[CheckpointError] = []
    outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if len(outside):
        first = int(outside[0])
        problems.append(
            ConfigError(
                f"d2t leaves the target's vocabulary for {len(outside):,} of {len(ids):,} tokens",
                expected=f"ids from 0 to {vocab_size - 1}",
                found=f"{first} + {int(differences[first])} = {int(ids[first])}" + _added_twice(differences),
                where=where,
                fix=_FIX,
            )
        )
    elif len(np.unique(ids)) < len(ids):
        problems.append(
            ConfigError("d2t gives two tokens of the head one id", expected="an id each", where=where, fix=_FIX)
        )
    elif chosen is not None and not np.array_equal(np.flatnonzero(chosen), np.sort(ids)):
        marked = np.flatnonzero(chosen)
        wrong = len(np.setdiff1d(ids, marked))
        problems.append(
            ConfigError(
                "d2t and t2d are of two vocabularies",
                expected=f"the {len(marked):,} ids that t2d marks",
                found=f"{wrong:,} of {len(ids):,} ids of d2t are not among them" + _added_twice(differences),
                where=where,
                fix=_FIX,
            )
        )
    elif chosen is None and _added_twice(differences):
        problems.append(
            ConfigError(
                "d2t holds ids of the target where differences belong: they would be added twice",
                expected="the target's id less the head's own, the same for neighbours that are both drafted",
                found=f"{', '.join(map(str, differences[:4].tolist()))}, ... which ascend at every step",
                where=where,
                fix=_FIX,
            )
        )
    return problems


def _added_twice(differences: Integers) -> str:
    """Words for numbers that look like ids themselves; none for others."""
    ascends = len(differences) > 1 and bool((np.diff(differences) > 0).all())
    return "; these are the target's ids, to which nothing is to be added" if ascends else ""
