"""The headers of a model that is elsewhere, as a checkpoint directory that planning reads: every tensor told of, none held.

It lies in the user's cache, one directory a revision, so that a second command reads nothing again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from exo_kimi.checkpoint.safetensors_io import MAX_HEADER_BYTES, cut_head
from exo_kimi.checkpoint.shards import INDEX_NAME
from exo_kimi.checkpoint.text_files import CONFIG_NAME, MOST_TEXT_BYTES
from exo_kimi.errors import FetchError, NotACheckpointError, TensorFileError
from exo_kimi.fetch.held import HeldFile
from exo_kimi.fetch.source import Listing, RemoteFile, Source, TryAgainError

READERS = 16  # headers are small: what they take is the way there and back
TRIES = 6
_LENGTH_BYTES = 8


def cache_directory() -> Path:
    """Where headers of models that are elsewhere are kept."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "exo-kimi" / "headers"


def weight_files(listing: Listing) -> list[RemoteFile]:
    """The model's weight files: those that are named model*, or all where none is.

    Raises:
        NotACheckpointError: there are none, or no config.json.
    """
    found = [file for name, file in sorted(listing.files.items()) if name.endswith(".safetensors")]
    models = [file for file in found if file.name.startswith("model")] or found
    if not models or CONFIG_NAME not in listing.files:
        raise NotACheckpointError(
            f"{listing.model} has no {CONFIG_NAME if models else 'safetensors files'}",
            found=", ".join(sorted(listing.files)[:5]) or "no file",
            where=listing.where,
            fix="give a model in the safetensors format, such as one of mlx-community's",
        )
    return models


def text_files(listing: Listing) -> list[RemoteFile]:
    """Everything beside the weights but their index, whose content the headers have."""
    return [
        file
        for name, file in sorted(listing.files.items())
        if not name.endswith(".safetensors") and name != INDEX_NAME and file.size <= MOST_TEXT_BYTES
    ]


def read_skeleton(source: Source, listing: Listing, *, progress: Callable[[int, int], None] | None = None) -> Path:
    """Read what planning needs of a model: its headers and its texts.

    Args:
        source: has the model.
        listing: its files.
        progress: called with (files read, files to read).

    Returns:
        A directory that `Checkpoint` opens.

    Raises:
        FetchError: the source fails.
        NotACheckpointError, TensorFileError: it is no checkpoint in the safetensors format.
    """
    organisation, _, name = listing.model.rpartition("/")
    root = cache_directory() / organisation / listing.revision[:40] / name
    root.mkdir(parents=True, exist_ok=True)
    wanted = [*text_files(listing), *weight_files(listing)]
    missing = [file for file in wanted if not (root / file.name).exists()]
    with ThreadPoolExecutor(READERS, thread_name_prefix="headers") as pool:
        for done, _ in enumerate(pool.map(lambda file: _fetch(source, file, root), missing), start=1):
            if progress is not None:
                progress(done, len(missing))
    return root


def header_of(skeleton: Path, name: str) -> bytes:
    """The whole header of a weight file, with its length in front."""
    return HeldFile.open(skeleton / name).head


def read_small(source: Source, file: RemoteFile, start: int, end: int) -> bytes:
    """A small range in one piece, tried again a few times.

    Raises:
        FetchError: the source fails, or goes on failing.
    """
    data = b""
    for attempt in range(TRIES):
        try:
            for piece in source.read(file, start + len(data), end):
                data += piece
            return data
        except TryAgainError as error:
            reason = error.reason
            if attempt < TRIES - 1:
                time.sleep(min(30.0, error.wait_s if error.wait_s is not None else 0.5 * 2**attempt))
    raise gave_up(file, reason)


def gave_up(file: RemoteFile, reason: str) -> FetchError:
    """The error of a source that goes on failing."""
    return FetchError(
        f"{file.name} does not come",
        found=f"{reason}, again and again",
        fix="check the connection and run the same command again: it goes on where it was",
    )


def check_content(file: RemoteFile, data: bytes) -> None:
    """Hold a small file against the hash in its listing.

    Raises:
        TensorFileError: it is another content.
    """
    found = git_sha1(data) if file.git_sha1 else hashlib.sha256(data).hexdigest()
    expected = file.git_sha1 or file.sha256
    if expected is not None and expected != found:
        raise TensorFileError(
            f"{file.name} came with another content than was listed",
            expected=expected,
            found=found,
            where=file.name,
            fix="run the same command again; if it stays so, use another mirror",
        )


def git_sha1(data: bytes) -> str:
    """Git's hash of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _fetch(source: Source, file: RemoteFile, root: Path) -> None:
    if file.name.endswith(".safetensors"):
        data, _ = cut_head(_header(source, file), (), sha256=file.sha256)
    else:
        data = read_small(source, file, 0, file.size) if file.size else b""
        check_content(file, data)
    temporary = root / f".{file.name}.{os.getpid()}"
    temporary.write_bytes(data)
    temporary.replace(root / file.name)


def _header(source: Source, file: RemoteFile) -> bytes:
    """The header of a weight file, without its length; two small reads."""
    length = int.from_bytes(read_small(source, file, 0, min(_LENGTH_BYTES, file.size)), "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, file.size - _LENGTH_BYTES):
        raise _no_header(file, f"a header of {length:,} bytes")
    header = read_small(source, file, _LENGTH_BYTES, _LENGTH_BYTES + length)
    try:
        raw = json.loads(header)
        ends = [_LENGTH_BYTES + length + each["data_offsets"][1] for name, each in raw.items() if name[:2] != "__"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise _no_header(file, f"{type(error).__name__}: {error}") from None
    if max(ends, default=0) > file.size:
        raise _no_header(file, f"tensors up to byte {max(ends):,} of {file.size:,}")
    return header


def _no_header(file: RemoteFile, found: str) -> TensorFileError:
    return TensorFileError(
        f"{file.name} at the source is not a safetensors file",
        expected="a length of 8 bytes and a header in JSON",
        found=found,
        where=file.name,
        fix="use another model or mirror: exo-kimi reads safetensors files only",
    )


def headers_bytes(skeleton: Path, files: Mapping[str, RemoteFile]) -> int:
    """Bytes that were read for a skeleton."""
    return sum(
        len(header_of(skeleton, name)) if name.endswith(".safetensors") else (skeleton / name).stat().st_size
        for name in files
        if (skeleton / name).exists()
    )
