"""Prefixes on a stage's disk: blocks of its caches, each a checksummed safetensors file that is whole or not there; and, where
layers have states, snapshots of them after some of the blocks, which are files of the same kind.

Which blocks to keep is the leader's decision, as are their keys; the directory's name binds what else a cache depends on.
Blocks are written by a thread of their own that nothing waits for: under another name, synced, and renamed, so that a process
that dies leaves no half block under a block's name; what is damaged in other ways (or was, before the rename reached the disk)
does not match its checksum. Only their owner can read them, for they derive from conversations; that also goes for what
older versions left.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Full, Queue

import mlx.core as mx
import numpy as np

from exo_kimi.checkpoint.safetensors_io import StoredTensor, read_header, write_file
from exo_kimi.runtime.prefix_key import is_key, is_snapshot
from exo_kimi.runtime.stage.caches import (
    Leaves,
    Snapshot,
    append,
    capacity_for,
    cut,
    growing_layers,
    hold_snapshot,
    pack_snapshot,
    trim_growing,
    unpack_snapshot,
)
from exo_kimi.runtime.stage.drafting import BLOCK_PREFIX, DraftRunner
from exo_kimi.runtime.stage.sequence_state import SequenceState
from exo_kimi.runtime.steps import Blocks

logger = logging.getLogger(__name__)
QUEUED_BLOCKS = 32  # a K2 stage's block takes some 10 MB
FILE_OVERHEAD_BYTES = 8192  # header, and what a file system rounds up to
CLOSE_S = 2.0
Changed = Callable[[tuple[str, ...], tuple[str, ...]], None]
"""Takes the keys that are on the disk from now on, and those that are not; called from both threads."""
SUFFIX, UNFINISHED = ".safetensors", ".part"
_PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR})  # nothing against the file
PAUSE_S = 60.0  # nothing is written after a failure, of which most are a full disk
UNUSED_S = 30 * 24 * 3600.0
"""After so long without a server, the blocks of another model, split or dtype are deleted."""
_ELEMENTS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U32": "<u4", "U8": "u1"}
_STORED: dict[mx.Dtype, tuple[str, mx.Dtype]] = {
    mx.float32: ("F32", mx.float32),
    mx.float16: ("F16", mx.float16),
    mx.bfloat16: ("BF16", mx.uint16),  # numpy has no bfloat16
    mx.uint32: ("U32", mx.uint32),
    mx.uint8: ("U8", mx.uint8),
}
_LOADED = {name: (words, dtype) for dtype, (name, words) in _STORED.items()}


def cache_identity(
    *, fingerprint: str, start_layer: int, end_layer: int, dtype: str, kv_format: str, block_tokens: int
) -> str:
    """What caches depend on beside the tokens, as 32 hexadecimal digits.

    Args:
        fingerprint: of the weights of the layers.
        start_layer, end_layer: the layers, half-open.
        dtype: of activations.
        kv_format: how the cache holds them.
        block_tokens: tokens of a block.
    """
    parts = ["exo-kimi prefix 1", fingerprint, start_layer, end_layer, dtype, kv_format, block_tokens]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def default_directory() -> Path:
    """Where prefixes go when no directory was named."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "exo-kimi" / "prefixes"


def make_private_directory(directory: Path) -> None:
    """Make a directory, and the parents that are missing, for this user alone; one that is there stays as it is.

    Raises:
        OSError: it cannot be made.
    """
    missing = [directory]
    while not missing[-1].parent.exists():
        missing.append(missing[-1].parent)
    for one in reversed(missing):
        one.mkdir(mode=0o700, exist_ok=True)


def make_blocks_private(parent: Path) -> None:
    """Take from other users what older versions let them read: the directories of blocks in `parent` and the files in those.

    What belongs to somebody else, or is gone meanwhile, is passed over.
    """
    with contextlib.suppress(OSError):
        for directory in [entry for entry in os.scandir(parent) if is_key(entry.name) and entry.is_dir()]:
            with contextlib.suppress(OSError):
                _make_private(directory)
                for entry in os.scandir(directory):
                    _make_private(entry)


def _make_private(entry: os.DirEntry[str]) -> None:
    mode = stat.S_IMODE(entry.stat(follow_symlinks=False).st_mode)
    if mode & 0o077 and not entry.is_symlink():
        with contextlib.suppress(FileNotFoundError):
            Path(entry.path).chmod(mode & 0o700)


class PrefixDisk:
    """Blocks of one stage on its disk.

    Args:
        parent: of the stage's directory.
        identity: see `cache_identity`; the directory's name.
        block_bytes: of one block's arrays.
        disk_bytes: the budget.
        snapshot_bytes: of one snapshot's arrays; 0 where no layer has states.
        changed: told of every block that was to be written, once, and of every one that turned out to be lost.

    Raises:
        OSError: the directory cannot be made or listed.
    """

    def __init__(
        self,
        parent: Path,
        identity: str,
        *,
        block_bytes: int,
        disk_bytes: int,
        changed: Changed,
        snapshot_bytes: int = 0,
    ) -> None:
        self.files = BlockFiles(parent / identity, identity)
        self._block_bytes = block_bytes + FILE_OVERHEAD_BYTES
        self._snapshot_bytes = snapshot_bytes + FILE_OVERHEAD_BYTES
        self._disk_bytes = disk_bytes
        self.capacity_blocks = disk_bytes // self._block_bytes
        self.capacity_snapshots = disk_bytes // self._snapshot_bytes
        self._changed = changed
        self._keys = dict.fromkeys(self.files.prepare())
        self._queued_bytes = 0
        self.files.delete_unused_siblings()
        while self._keys and self._held_bytes > disk_bytes:
            self.drop([next(iter(self._keys))])
        self._paused_until_s = 0.0
        self._counting = threading.Lock()
        self._queue: Queue[tuple[str, Mapping[str, StoredTensor]] | None] = Queue(QUEUED_BLOCKS)
        self._thread = threading.Thread(target=self._write_all, name="prefix-disk", daemon=True)
        self._thread.start()

    def keys(self) -> tuple[str, ...]:
        """What is there, the block that was not used for longest first."""
        return tuple(self._keys)

    def write(self, key: str, tensors: Mapping[str, StoredTensor]) -> None:
        """Put a block on its way; what finds no room is not waited for, and told of as gone."""
        if key in self._keys:
            self._changed((key,), ())
            return
        try:
            if self._is_paused or self._held_bytes + self._queued_bytes + self._size(key) > self._disk_bytes:
                raise Full
            self._queue.put_nowait((key, tensors))
            with self._counting:
                self._queued_bytes += self._size(key)
        except Full:
            self._changed((), (key,))

    def refuse(self, keys: Sequence[str]) -> None:
        """Blocks that were to be written will not be."""
        self._changed((), tuple(keys))

    def read(self, key: str) -> dict[str, StoredTensor] | None:
        """A block; None when it cannot be read now, and, after it was deleted and told of, when it is not what was written."""
        try:
            return self.files.read(key)
        except OSError as error:  # no descriptor is left, say: the block is as good as it was
            logger.warning("a prefix on disk cannot be read now and is computed again: %s", error)
            return None
        except DamagedBlockError as damage:
            logger.warning("a prefix on disk cannot be used and is computed again: %s", damage)
            self.drop([key])
            self._changed((), (key,))
            return None

    def drop(self, keys: Iterable[str]) -> None:
        """Delete blocks."""
        for key in keys:
            self._keys.pop(key, None)
            self.files.delete(key)

    def close(self) -> None:
        """Stop after what is queued, or soon."""
        deadline = threading.Timer(CLOSE_S, self._empty_queue)
        deadline.daemon = True
        deadline.start()
        self._queue.put(None)
        self._thread.join(2 * CLOSE_S)
        deadline.cancel()

    def flush(self) -> None:
        """Wait until nothing is queued."""
        self._queue.join()

    def _empty_queue(self) -> None:
        while True:
            try:
                self._queue.get_nowait()
            except Empty:
                self._queue.put(None)
                return

    @property
    def _held_bytes(self) -> int:
        return sum(map(self._size, tuple(self._keys)))

    def _size(self, key: str) -> int:
        return self._snapshot_bytes if is_snapshot(key) else self._block_bytes

    @property
    def _is_paused(self) -> bool:
        return time.monotonic() < self._paused_until_s

    def _write_all(self) -> None:
        while (item := self._queue.get()) is not None:
            key, tensors = item
            try:
                if not self._is_paused:
                    self.files.write(key, tensors)
                    self._keys[key] = None
            except Exception as error:  # whatever it is, the queue must go on being emptied
                self._paused_until_s = time.monotonic() + PAUSE_S
                logger.warning(
                    "prefixes are not written to %s for %.0f s: %s. Those in memory go on working",
                    self.files.directory,
                    PAUSE_S,
                    getattr(error, "strerror", None) or repr(error),
                    exc_info=None if isinstance(error, OSError | MemoryError) else error,
                )
            with self._counting:
                self._queued_bytes -= self._size(key)
            self._changed(*(((key,), ()) if key in self._keys else ((), (key,))))
            self._queue.task_done()


@dataclass(frozen=True, slots=True)
class OpenedDisk:
    """What a stage tells of its disk: for how many blocks, or else snapshots, it has room, and the keys of what is there, the one
    that was not used for longest first."""

    blocks: int = 0
    snapshots: int = 0
    keys: tuple[str, ...] = ()

    @classmethod
    def of(cls, disk: PrefixDisk | None) -> OpenedDisk:
        """Nothing without a disk."""
        return cls() if disk is None else cls(disk.capacity_blocks, disk.capacity_snapshots, disk.keys())


def read_blocks(disk: PrefixDisk | None, sequence: SequenceState, order: Blocks, *, drafts: DraftRunner | None) -> int:
    """Append blocks from disk to the caches of a sequence, as far as they are good.

    Args:
        disk: of this stage.
        sequence: its caches hold `order.offset` tokens; memory for all that it is to hold in the end is taken at once.
        order: the blocks.
        drafts: the stage's draft head, whose part of each block is restored too.

    Returns:
        Tokens that the caches hold now; a block less where the states after the last one were asked for and are not to be had.
    """
    found: list[Leaves] = []
    draft = sequence.draft if drafts is not None else None
    for key in order.keys:
        block = disk.read(key) if disk is not None else None
        stored = {} if block is None else {name: each for name, each in block.items() if not _is_draft(name)}
        if block is None or not _fits(stored, layers=growing_layers(sequence.caches), tokens=order.block_tokens):
            break
        found.append({name: _to_mlx(each) for name, each in block.items() if not _is_draft(name) or draft is not None})
    if found:
        joined = {
            name: mx.concatenate([block[name] for block in found], axis=3)
            for name in found[0]
            if all(name in block for block in found)
        }
        own = {name: leaf for name, leaf in joined.items() if not _is_draft(name)}
        append(sequence.caches, own, capacity=capacity_for(sequence.total, sequence.caches))
        if drafts is not None and draft is not None:
            theirs = {name.removeprefix(BLOCK_PREFIX): leaf for name, leaf in joined.items() if _is_draft(name)}
            drafts.restore(draft, theirs, start=order.offset, total=sequence.total)
    reached = order.offset + len(found) * order.block_tokens
    if order.snapshot is None or reached < order.end:
        return reached
    snapshot = _read_snapshot(disk, sequence, order.snapshot)
    if snapshot is None:
        trim_growing(sequence.caches, reached - order.block_tokens)
        return reached - order.block_tokens
    hold_snapshot(sequence.caches, snapshot, reached)
    sequence.snapshots[reached] = snapshot
    return reached


def _read_snapshot(disk: PrefixDisk | None, sequence: SequenceState, key: str) -> Snapshot | None:
    stored = disk.read(key) if disk is not None else None
    if stored is None:
        return None
    return unpack_snapshot({name: _to_mlx(each) for name, each in stored.items()}, sequence.caches)


def write_blocks(
    disk: PrefixDisk | None, sequence: SequenceState, order: Blocks, *, drafts: DraftRunner | None
) -> None:
    """Put blocks of a sequence's caches, what a draft head holds of it and a snapshot on their way to the disk: one copy here, so
    that the caches may grow meanwhile."""
    for index, key in enumerate(order.keys):
        start = order.offset + index * order.block_tokens
        end = start + order.block_tokens
        if disk is not None:
            leaves = cut(sequence.caches, start, end)
            if drafts is not None:
                leaves |= drafts.blocks(sequence.draft, start, end)
            disk.write(key, {name: _to_numpy(leaf) for name, leaf in leaves.items()})
    if disk is not None and order.snapshot is not None:
        snapshot = sequence.snapshots.get(order.end)
        if snapshot is None:
            disk.refuse([order.snapshot])
        else:
            disk.write(order.snapshot, {name: _to_numpy(leaf) for name, leaf in pack_snapshot(snapshot).items()})


def _is_draft(name: str) -> bool:
    return name.startswith(BLOCK_PREFIX)


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
        make_private_directory(self.directory)
        make_blocks_private(self.directory.parent)
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
            os.close(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
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
            OSError: it cannot be read now.
        """
        path = self._path(key)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError as error:
            if error.errno in _PASSING:
                raise
            raise DamagedBlockError(f"{path}: {error.strerror}") from error
        header, entries, problems = read_header(path)
        if problems:
            raise DamagedBlockError(str(problems[0]))
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


def _fits(block: dict[str, StoredTensor], *, layers: int, tokens: int) -> bool:
    shapes = [stored.data.shape for stored in block.values()]
    return bool(shapes) == bool(layers) and all(
        len(s) == 5 and s[0] == layers and s[1:4] == (1, 1, tokens) for s in shapes
    )


def _to_numpy(leaf: mx.array) -> StoredTensor:
    name, words = _STORED[leaf.dtype]
    return StoredTensor(name, np.array(leaf.view(words), copy=False))


def _to_mlx(stored: StoredTensor) -> mx.array:
    words, dtype = _LOADED[stored.dtype]
    return mx.array(stored.data).view(dtype) if words != dtype else mx.array(stored.data)


def _size(dtype: str) -> int:
    return np.dtype(_ELEMENTS[dtype]).itemsize
