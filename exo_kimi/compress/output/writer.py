"""Write an output directory: shard by shard, verified as it lies on disk, resumable after a kill at any moment.

with CheckpointWriter(job) as writer:
    for shard in writer.missing():
        with writer.open(shard) as file:
            file.put("model.norm.weight", data)             # or in pieces, in any order, from several threads
            file.put("lm_head.weight", rows, at=first_byte)
    writer.finish()

`missing` leaves out the shards that an earlier run has finished. A shard is written as `NAME.part`, read again from the disk
behind the writing, compared, and only then renamed; config.json comes last, so that nothing takes an unfinished output for a
checkpoint.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from exo_kimi.checkpoint.text_files import CONFIG_NAME
from exo_kimi.compress.output.job import OutputJob
from exo_kimi.compress.output.journal import PART, copy_whole, open_journal, write_whole
from exo_kimi.compress.output.shard_file import Progress, ShardFile
from exo_kimi.compress.output.shards import OutputShard
from exo_kimi.errors import MachineError, UsageError
from exo_kimi.units import format_bytes

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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

        It is verified as it is written, its end while the next one is, and has its name when `finish` returns at the latest.

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
                file = ShardFile(shard, descriptor, part, behind=self._pool, progress=self._progress)
                try:
                    file.put_header()
                    yield file
                    self._wait()
                except BaseException:
                    file.abandon()
                    raise
            except BaseException:
                os.close(descriptor)
                raise
            self._verifying = self._pool.submit(self._settle, file, part)
            self._verifying.add_done_callback(lambda _: os.close(descriptor))

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

    def _settle(self, file: ShardFile, part: Path) -> None:
        """Have a shard on the disk, verify what is left of it, note it, and give it its name: while the next one is written."""
        with self._failures(part):
            sha256 = file.settle()
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
