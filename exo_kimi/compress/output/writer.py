"""Write an output directory: shard by shard, verified as it lies on disk, resumable after a kill at any moment.

with CheckpointWriter(job) as writer:
    for shard in writer.missing():
        with writer.open(shard) as file:
            file.put("model.norm.weight", data)             # or in pieces, in any order, from several threads
            file.put("lm_head.weight", rows, at=first_byte)
    writer.finish()

`missing` leaves out the shards that an earlier run has finished. A shard is written as `NAME.part`, read again from the disk,
compared, and only then renamed; config.json comes last, so that nothing takes an unfinished output for a checkpoint.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from exo_kimi.checkpoint.text_files import CONFIG_NAME
from exo_kimi.compress.output.job import OutputJob
from exo_kimi.compress.output.journal import PART, copy_whole, open_journal, write_whole
from exo_kimi.compress.output.shards import OutputShard
from exo_kimi.errors import MachineError, TensorFileError, UsageError
from exo_kimi.units import format_bytes

_BLOCK_BYTES = 2**20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class _Piece:
    start: int
    end: int
    crc: int


class ShardFile:
    """A shard that is being written, at any place and from any thread.

    Args:
        shard: what it will hold.
        descriptor: of the file.
        progress: called with the bytes of each piece.
    """

    def __init__(self, shard: OutputShard, descriptor: int, progress: Progress | None) -> None:
        self.shard = shard
        self._descriptor = descriptor
        self._progress = progress
        self._sizes = {tensor.name: tensor.nbytes for tensor in shard.tensors}
        self._pieces: list[_Piece] = []
        self._lock = threading.Lock()

    def put(self, name: str, data: Any, *, at: int = 0) -> None:
        """Write bytes of a tensor.

        Args:
            name: of the tensor.
            data: whatever has a contiguous buffer: bytes, a memoryview, a NumPy array.
            at: first byte inside the tensor.

        Raises:
            KeyError, ValueError: the shard has no such tensor, or the bytes do not lie inside it.
            OSError: they cannot be written.
        """
        view = data if isinstance(data, memoryview) else memoryview(_bytes_of(data))
        view = view.cast("B") if view.nbytes else view
        if at < 0 or at + len(view) > self._sizes[name]:
            raise ValueError(f"{name}: bytes {at} to {at + len(view)} of {self._sizes[name]}")
        start = self.shard.starts[name] + at
        self._write(view, start)

    def put_header(self) -> None:
        """Write what stands before the tensors."""
        self._write(memoryview(self.shard.header), 0)

    def _write(self, view: memoryview, start: int) -> None:
        position, rest = start, view
        while len(rest):
            count = os.pwrite(self._descriptor, rest, position)
            position, rest = position + count, rest[count:]
        piece = _Piece(start, position, zlib.crc32(view))
        with self._lock:
            if len(view):
                self._pieces.append(piece)
            if self._progress is not None:
                self._progress(len(view))

    def verify(self, path: Path) -> str:
        """Read the file again and compare it with what was given.

        Returns:
            Its SHA-256.

        Raises:
            ValueError: bytes that nobody wrote, or that were written twice: a defect of the caller.
            TensorFileError: the disk gives back other bytes.
            OSError: it cannot be read.
        """
        digest, position = hashlib.sha256(), 0
        with path.open("rb", buffering=0) as stream:
            _read_from_disk(stream.fileno())
            for piece in sorted(self._pieces, key=lambda piece: piece.start):
                if piece.start != position:
                    raise ValueError(f"{self.shard.file}: nobody wrote bytes {position} to {piece.start}")
                crc = 0
                while position < piece.end:
                    block = stream.read(min(_BLOCK_BYTES, piece.end - position))
                    if not block:
                        break
                    digest.update(block)
                    crc = zlib.crc32(block, crc)
                    position += len(block)
                if crc != piece.crc or position != piece.end:
                    raise TensorFileError(
                        "the disk gave back other bytes than were written",
                        expected=f"crc32 {piece.crc:08x} of bytes {piece.start:,} to {piece.end:,}",
                        found=f"{crc:08x}",
                        where=path,
                        fix="the disk or its cable is not to be trusted: write to another one",
                    )
        if position != self.shard.file_bytes:
            raise ValueError(f"{self.shard.file}: nobody wrote bytes {position} to {self.shard.file_bytes}")
        return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a run wrote.

    Args:
        directory: the output.
        files: weight files in all.
        kept: of them, those that an earlier run had finished.
        weight_bytes: of all tensors.
        linked_bytes: of files that are linked and not written.
        unchanged: everything was there already, and nothing was touched.
    """

    directory: Path
    files: int
    kept: int
    weight_bytes: int
    linked_bytes: int
    unchanged: bool


class CheckpointWriter:
    """Writer of one output directory. A context manager: one at a time for a directory.

    Args:
        job: what to write.
        progress: called with the bytes of each piece that is written.

    Raises:
        UsageError: the directory holds something else, another process writes into it, or it cannot be written.
        MachineError: the disk has no room for what is missing.
    """

    def __init__(self, job: OutputJob, progress: Progress | None = None) -> None:
        self.job = job
        self._progress = progress
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="verify")
        self._verifying: Future[None] | None = None
        with self._failures():
            job.directory.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(job.directory)
        try:
            with self._failures():
                self._journal = open_journal(job)
            self._kept = self._done()
            self._check_room()
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        os.close(self._lock)

    def missing(self) -> Iterator[OutputShard]:
        """The shards that are not finished, in order."""
        for shard in self.job.shards:
            if not self._journal.is_done(shard.file):
                yield shard

    @contextmanager
    def open(self, shard: OutputShard) -> Iterator[ShardFile]:
        """Write one shard; every byte of every tensor must be put before the block ends.

        It is verified while the next one is written, and has its name when `finish` returns at the latest.

        Raises:
            MachineError: the disk is full; what is done stays, and a later run goes on.
            UsageError: the directory cannot be written.
            TensorFileError: the disk gave back other bytes.
        """
        part = self.job.directory / (shard.file + PART)
        with self._failures(part):
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                _reserve(descriptor, shard.file_bytes)
                file = ShardFile(shard, descriptor, self._progress)
                file.put_header()
                yield file
                self._wait()
            except BaseException:
                os.close(descriptor)
                raise
            self._verifying = self._pool.submit(self._settle, file, descriptor, part)

    def finish(self) -> Written:
        """Write the other files, config.json last, and the manifest.

        Raises:
            MachineError, UsageError, TensorFileError: as `open`.
        """
        job = self.job
        with self._failures():
            self._wait()
            files = [*(shard.file for shard in job.shards), *job.texts, *(p.name for p in job.copied), *job.links]
            whole = all(self._journal.is_done(name) for name in files)
            if not whole:
                self._write_rest()
            if not whole or self._journal.is_open:
                self._journal.finish()
        return Written(
            directory=job.directory,
            files=len(job.shards) + len(job.links),
            kept=self._kept,
            weight_bytes=job.weight_bytes,
            linked_bytes=sum(path.stat().st_size for path in job.links.values()),
            unchanged=whole,
        )

    def _write_rest(self) -> None:
        job = self.job
        for name, target in job.links.items():
            link = job.directory / name
            link.unlink(missing_ok=True)
            link.symlink_to(target.resolve())
            self._journal.files[name] = {"bytes": target.stat().st_size, "sha256": None}
        for path in job.copied:
            size, sha256 = copy_whole(path, job.directory / path.name)
            self._journal.files[path.name] = {"bytes": size, "sha256": sha256}
        for name in sorted(job.texts, key=lambda name: name == CONFIG_NAME):
            data = job.texts[name].encode()
            write_whole(job.directory / name, data)
            self._journal.files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def _settle(self, file: ShardFile, descriptor: int, part: Path) -> None:
        """Have a shard on the disk, verify it, note it, and give it its name: while the next one is written."""
        with self._failures(part):
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            sha256 = file.verify(part)
            self._journal.note(file.shard.file, file.shard.file_bytes, sha256)
            part.replace(self.job.directory / file.shard.file)

    def _done(self) -> int:
        return sum(self._journal.is_done(shard.file) for shard in self.job.shards)

    def _wait(self) -> None:
        if self._verifying is not None:
            waiting, self._verifying = self._verifying, None
            waiting.result()

    def _check_room(self) -> None:
        needed = sum(shard.file_bytes for shard in self.missing())
        free = shutil.disk_usage(self.job.directory).free
        if needed > free:
            raise MachineError(
                "the disk has no room for the output",
                expected=f"{format_bytes(needed)} for {len(list(self.missing()))} files that are missing",
                found=f"{format_bytes(free)} free",
                where=self.job.directory,
                fix="free some space, or give a directory on another disk",
            )

    @contextmanager
    def _failures(self, part: Path | None = None) -> Iterator[None]:
        """A failure of the disk as one of our errors; an unfinished part gives its room back."""
        try:
            yield
        except OSError as error:
            if part is not None:
                part.unlink(missing_ok=True)
            if error.errno not in _FULL:
                raise UsageError(
                    "the output cannot be written", found=error.strerror, where=error.filename or self.job.directory
                ) from error
            raise MachineError(
                f"the disk is full: {error.strerror}",
                found=f"{self._done()} of {len(self.job.shards)} weight files are done, and stay",
                where=self.job.directory,
                fix="free some space and run the same command again: it goes on from there",
            ) from error


def _bytes_of(data: Any) -> Any:
    """What has a buffer that memoryview takes: NumPy has none for bfloat16 and the like."""
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8) if isinstance(data, np.ndarray) else data


def _lock(directory: Path) -> int:
    """Hold the directory for this process.

    Raises:
        UsageError: another one has it.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise UsageError(
            "another process writes into the output directory",
            found=error.strerror,
            where=directory,
            fix="wait for it, or give another directory",
        ) from None
    return descriptor


def _reserve(descriptor: int, size: int) -> None:
    """Give a file its size and, where the system can, its room on the disk.

    Raises:
        OSError: the disk has no room.
    """
    if sys.platform == "linux":
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    os.ftruncate(descriptor, size)


def _read_from_disk(descriptor: int) -> None:
    """Have the next reads come from the disk, not from the memory that was written."""
    if sys.platform == "linux":
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    elif sys.platform == "darwin":
        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
