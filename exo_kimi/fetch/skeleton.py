"""The headers of a model that is elsewhere, as a checkpoint directory that planning reads: every tensor told of, none held.

It lies in the user's cache, one directory a revision, so that a second command reads nothing again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from exo_kimi.checkpoint.safetensors_io import MAX_HEADER_BYTES, cut_head
from exo_kimi.checkpoint.shards import INDEX_NAME
from exo_kimi.checkpoint.text_files import CONFIG_NAME, MOST_TEXT_BYTES
from exo_kimi.errors import FetchError, NotACheckpointError, TensorFileError
from exo_kimi.fetch.alike import derive_header
from exo_kimi.fetch.held import HeldFile
from exo_kimi.fetch.source import Listing, RemoteFile, Source, TryAgainError

READERS = 16  # headers are small: what they take is the way there and back
TRIES = 6
BEGIN_BYTES = 4096  # of every weight file: a whole header, where a tensor holds all experts of a layer
MOST_OF_A_KIND = 3  # headers of one size, from which others may follow
READ_ALL_BYTES = 1 << 20  # headers that are together no more than this are all read
_LENGTH_BYTES = 8
_DERIVED = "-derived"


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


def read_skeleton(
    source: Source, listing: Listing, *, derive: bool = False, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Read what planning needs of a model: its headers and its texts.

    Args:
        source: has the model.
        listing: its files.
        derive: where the headers are large, read one of each kind and derive those that differ in a layer's number only, by the
            law of `fetch.alike`. They lie apart: what fetches weights reads every header.
        progress: called with (files read, files to read).

    Returns:
        A directory that `Checkpoint` opens.

    Raises:
        FetchError: the source fails.
        NotACheckpointError, TensorFileError: it is no checkpoint in the safetensors format.
    """
    wanted = [*text_files(listing), *weight_files(listing)]
    root = skeleton_directory(listing)
    missing = _missing(wanted, root)
    if missing and derive and not _missing(wanted, skeleton_directory(listing, derived=True)):
        return _noted(skeleton_directory(listing, derived=True))
    with ThreadPoolExecutor(READERS, thread_name_prefix="headers") as pool:
        begun = list(pool.map(lambda file: _begin(source, file), missing))
        known = _KnownHeaders(begun) if derive else None
        if known is not None and known.derives:
            root = skeleton_directory(listing, derived=True)
            missing = _missing(missing, root)
        root.mkdir(parents=True, exist_ok=True)
        fetched = pool.map(lambda each: _fetch(source, each, root, known), [b for b in begun if b.file in missing])
        for done, _ in enumerate(fetched, start=1):
            if progress is not None:
                progress(done, len(missing))
    return _noted(root)


def last_skeleton(model: str) -> Path | None:
    """The headers that were read last of a model, for when its source cannot be asked; None where there are none."""
    note = _note(cache_directory() / model)
    root = note.parent / note.read_text().strip() / note.stem if note.exists() else None
    return root if root is not None and root.is_dir() else None


def _noted(root: Path) -> Path:
    """A skeleton that is complete, noted as the last of its model."""
    note = _note(root.parents[1] / root.name)
    temporary = note.with_name(f".{note.name}.{os.getpid()}")
    temporary.write_text(root.parent.name)
    temporary.replace(note)
    return root


def _note(place: Path) -> Path:
    return place.with_name(f"{place.name}.last")


def skeleton_directory(listing: Listing, *, derived: bool = False) -> Path:
    """Where the headers of a model's revision are kept: all as they were read, or some of them derived."""
    organisation, _, name = listing.model.rpartition("/")
    revision = listing.revision[:40] + (_DERIVED if derived else "")
    return cache_directory() / organisation / revision / name


def _missing(wanted: Sequence[RemoteFile], root: Path) -> list[RemoteFile]:
    return [file for file in wanted if not (root / file.name).exists()]


def is_derived(skeleton: Path) -> bool:
    """Whether headers of a skeleton were derived."""
    return skeleton.parent.name.endswith(_DERIVED)


def header_of(skeleton: Path, name: str) -> bytes:
    """The whole header of a weight file, with its length in front."""
    return HeldFile.open(skeleton / name).head


def read_small(source: Source, file: RemoteFile, start: int, end: int, *, kept: Path | None = None) -> bytes:
    """A small range in one piece, tried again a few times.

    Args:
        source, file: has it.
        start, end: first byte and one past the last.
        kept: a file that takes what comes, by which the next process goes on after a kill.

    Raises:
        FetchError: the source fails, or goes on failing.
    """
    with _kept_bytes(kept) as came:
        for attempt in range(TRIES):
            try:
                if start + len(came.data) < end:
                    for piece in source.read(file, start + len(came.data), end):
                        came.add(piece)
                return bytes(came.data[: end - start])
            except TryAgainError as error:
                reason = error.reason
                if attempt < TRIES - 1:
                    time.sleep(min(30.0, error.wait_s if error.wait_s is not None else 0.5 * 2**attempt))
    raise gave_up(file, reason)


@dataclass(slots=True)
class _KeptBytes:
    """What came of a range, in memory and, with a stream, in a file."""

    data: bytearray = field(default_factory=bytearray)
    stream: BinaryIO | None = None

    def add(self, piece: bytes | memoryview) -> None:
        self.data += piece
        if self.stream is not None:
            self.stream.write(piece)


@contextmanager
def _kept_bytes(path: Path | None) -> Iterator[_KeptBytes]:
    """What a file has of a range; without it where another process is at work on it."""
    if path is None:
        yield _KeptBytes()
        return
    with path.open("a+b", buffering=0) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield _KeptBytes()
            return
        stream.seek(0)
        yield _KeptBytes(bytearray(stream.read()), stream)


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


@dataclass(frozen=True, slots=True)
class _Begun:
    """A file and its first bytes; of a weight file also how long its header is, of a text 0."""

    file: RemoteFile
    data: bytes
    header_bytes: int

    @property
    def header(self) -> bytes | None:
        """The header, where it is among the first bytes."""
        end = _LENGTH_BYTES + self.header_bytes
        return self.data[_LENGTH_BYTES:end] if end <= len(self.data) else None

    @property
    def tensor_bytes(self) -> int:
        """Of all tensors of the file."""
        return self.file.size - _LENGTH_BYTES - self.header_bytes


class _KnownHeaders:
    """Headers that were read, for others to follow from; none follows where all together are small."""

    def __init__(self, begun: Sequence[_Begun]) -> None:
        large = [each for each in begun if each.header_bytes and each.header is None]
        self.derives = sum(each.header_bytes for each in large) > READ_ALL_BYTES
        self._locks = {each.tensor_bytes: threading.Lock() for each in large}
        self._known: dict[int, list[bytes]] = {}

    def header(self, begun: _Begun, read: Callable[[], bytes]) -> bytes:
        """The header of one file: derived where one of as many bytes is known, else read."""
        if not self.derives:
            return read()
        with self._locks[begun.tensor_bytes]:  # those of one kind wait for its first ones
            known = self._known.setdefault(begun.tensor_bytes, [])
            for other in known:
                derived = derive_header(other, begin=begun.data[_LENGTH_BYTES:], length=begun.header_bytes)
                if derived is not None:
                    return derived
            if len(known) < MOST_OF_A_KIND:
                known.append(read())
                return known[-1]
        return read()


def _begin(source: Source, file: RemoteFile) -> _Begun:
    """The first bytes of a weight file: all that there is to read, where its header is small."""
    if not file.name.endswith(".safetensors"):
        return _Begun(file, b"", 0)
    data = read_small(source, file, 0, min(BEGIN_BYTES, file.size))
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, file.size - _LENGTH_BYTES):
        raise _no_header(file, f"a header of {length:,} bytes")
    return _Begun(file, data, length)


def _fetch(source: Source, begun: _Begun, root: Path, known: _KnownHeaders | None) -> None:
    """Have one file of a skeleton."""
    kept = root / f".{begun.file.name}.part"
    goes_on = kept.exists()
    try:
        data = _content(source, begun, kept, known)
    except TensorFileError:
        kept.unlink(missing_ok=True)
        if not goes_on:
            raise
        data = _content(source, begun, kept, known)  # what was kept may be from before a crash of the machine
    temporary = root / f".{begun.file.name}.{os.getpid()}"
    temporary.write_bytes(data)
    temporary.replace(root / begun.file.name)
    kept.unlink(missing_ok=True)


def _content(source: Source, begun: _Begun, kept: Path, known: _KnownHeaders | None) -> bytes:
    file = begun.file
    if not begun.header_bytes:
        data = read_small(source, file, 0, file.size, kept=kept)
        check_content(file, data)
        return data

    def read() -> bytes:
        end = _LENGTH_BYTES + begun.header_bytes
        return begun.data[_LENGTH_BYTES:] + read_small(source, file, len(begun.data), end, kept=kept)

    header = begun.header
    if header is None:
        header = read() if known is None else known.header(begun, read)
    _check_header(file, header)
    return cut_head(header, (), sha256=file.sha256)[0]


def _check_header(file: RemoteFile, header: bytes) -> None:
    """Hold a header against the size of its file."""
    try:
        raw = json.loads(header)
        ends = [each["data_offsets"][1] for name, each in raw.items() if name != "__metadata__"]
        end = _LENGTH_BYTES + len(header) + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise _no_header(file, f"{type(error).__name__}: {error}") from None
    if end > file.size:
        raise _no_header(file, f"tensors up to byte {end:,} of {file.size:,}")


def _no_header(file: RemoteFile, found: str) -> TensorFileError:
    return TensorFileError(
        f"{file.name} at the source is not a safetensors file",
        expected="a length of 8 bytes and a header in JSON",
        found=found,
        where=file.name,
        fix="use another model or mirror: exo-kimi reads safetensors files only",
    )
