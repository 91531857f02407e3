"""Many pieces of many files at a time, each tried again until it is there, each file verified before it has its name."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from exo_kimi.checkpoint.text_files import read_bytes
from exo_kimi.errors import DamagedWeightsError
from exo_kimi.fetch.part import FetchPiece, PartFile, file_sha256
from exo_kimi.fetch.skeleton import gave_up, git_sha1
from exo_kimi.fetch.source import RemoteFile, Source, TryAgainError

CONNECTIONS = 8
TRIES = 10  # without a byte in between
WAIT_S = 0.5  # before the second try; each next one waits twice as long
MOST_WAIT_S = 30.0


@dataclass(slots=True)
class TransferProgress:
    """What a transfer has done so far, for whoever shows it.

    Args:
        total_bytes: of all files.
        done_bytes: of them that are here, those from before included.
        fetched_bytes: that came in this run.
        state: what it is doing beside fetching, or waits for; empty otherwise.
    """

    total_bytes: int
    done_bytes: int = 0
    fetched_bytes: int = 0
    state: str = ""
    began_s: float = field(default_factory=time.monotonic)

    @property
    def bytes_per_s(self) -> float:
        """Mean rate of this run."""
        return self.fetched_bytes / max(1e-3, time.monotonic() - self.began_s)

    @property
    def left_s(self) -> float | None:
        """Time that is left at the mean rate; None before anything came."""
        return (self.total_bytes - self.done_bytes) / self.bytes_per_s if self.fetched_bytes else None


Verified = Callable[[PartFile, str | None], None]


class Transfer:
    """Fetch parts from a source until all of them are files.

    Args:
        source: has them.
        parts: what is to be fetched; closed at the end.
        progress: kept up to date.
        on_file: told of each file that is there, with the SHA-256 that was computed, None for a small one.
        connections: requests at a time.
    """

    def __init__(
        self,
        source: Source,
        parts: Sequence[PartFile],
        progress: TransferProgress,
        *,
        on_file: Verified,
        connections: int = CONNECTIONS,
    ) -> None:
        self._source, self._parts, self._progress = source, parts, progress
        self._on_file, self._connections = on_file, connections
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._waiting: deque[tuple[PartFile, FetchPiece]] = deque()
        self._open = {id(part): len(part.pieces) for part in parts}
        self._tries: dict[int, int] = {}

    def run(self) -> None:
        """Fetch, verify, and put in place.

        Raises:
            FetchError: the source refuses, or goes on failing.
            DamagedWeightsError: a file came with another content twice.
            OSError: the disk does not take it.
        """
        for part in self._parts:
            self._waiting.extend((part, piece) for piece in part.pieces)
        try:
            for part in self._parts:
                if not part.pieces:
                    self._finish(part)
            with ThreadPoolExecutor(self._connections, thread_name_prefix="fetch") as pool:
                workers = [pool.submit(self._work) for _ in range(self._connections)]
                try:
                    done, _ = wait(workers, return_when=FIRST_EXCEPTION)
                except BaseException:  # Ctrl-C: workers that wait for bytes are not waited for
                    self._source.close()
                    raise
                finally:
                    self._stop.set()
                for worker in done:
                    worker.result()
        finally:
            for part in self._parts:
                part.close()

    def _work(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                if not self._waiting:
                    return
                part, piece = self._waiting.popleft()
            self._fetch(part, piece)
            if self._stop.is_set():
                return
            with self._lock:
                self._open[id(part)] -= 1
                complete = self._open[id(part)] == 0
            if complete and not self._finish(part):
                self._again(part)

    def _fetch(self, part: PartFile, piece: FetchPiece) -> None:
        """One piece, from where it is, until it is there or the transfer stops."""
        tries = 0
        while (done := part.done_of(piece)) < piece.length and not self._stop.is_set():
            wait_s: float | None = None
            try:
                start, end = piece.source_start + done, piece.source_start + piece.length
                for data in self._source.read(part.target.file, start, end):
                    part.write(piece, data)
                    tries = 0
                    with self._lock:
                        self._progress.done_bytes += len(data)
                        self._progress.fetched_bytes += len(data)
                        self._progress.state = ""
                    if self._stop.is_set():
                        return
            except TryAgainError as error:
                tries += 1
                if tries >= TRIES:
                    raise gave_up(part.target.file, error.reason) from error
                wait_s = error.wait_s if error.wait_s is not None else min(MOST_WAIT_S, WAIT_S * 2 ** (tries - 1))
                self._progress.state = f"{error.reason}; again in {wait_s:.0f} s"
            if wait_s is not None:
                self._stop.wait(wait_s)

    def _finish(self, part: PartFile) -> bool:
        """Verify a complete part and put it in place; False where its content is not what was listed."""
        target = part.target
        expected, found, sha256 = self._hashes(part)
        if expected is not None and expected != found:
            tries = self._tries[id(part)] = self._tries.get(id(part), 0) + 1
            if tries > 1:
                part.begin_again()
                raise DamagedWeightsError(
                    f"{target.file.name} came with another content than was listed, twice",
                    expected=expected,
                    found=found,
                    where=part.final_path,
                    fix="run the same command again later, or use another mirror; what came is not kept",
                )
            return False
        part.finish()
        self._on_file(part, sha256)
        return True

    def _hashes(self, part: PartFile) -> tuple[str | None, str, str | None]:
        """The hash that a part must have, None where nobody knows one; the one that it has; and the SHA-256 of the whole part,
        None of a small text."""
        target, file = part.target, part.target.file
        if target.is_whole and file.git_sha1:
            return file.git_sha1, git_sha1(read_bytes(part.path)), None
        self._progress.state = f"verifying {file.name}"
        sha256 = part.sha256()
        self._progress.state = ""
        if target.is_whole and file.sha256:
            return file.sha256, sha256, sha256
        if target.is_whole:
            return self._source.digest(file, ((0, file.size),)), sha256, sha256
        pieces = [each for each in part.pieces if file.holds(each.source_start, each.source_start + each.length)]
        ranges = tuple((each.source_start, each.source_start + each.length) for each in pieces)
        expected = self._source.digest(file, ranges) if ranges else None
        return expected, part.sha256_of(pieces) if expected is not None else sha256, sha256

    def _again(self, part: PartFile) -> None:
        part.begin_again()
        with self._lock:
            self._progress.done_bytes -= part.target.fetch_bytes
            self._progress.state = f"{part.target.file.name} was damaged on its way and is fetched again"
            self._open[id(part)] = len(part.pieces)
            self._waiting.extend((part, piece) for piece in part.pieces)


def is_content(path: Path, file: RemoteFile) -> bool:
    """Whether a file of this disk has the content of one in a listing; False where its hash is not known.

    Raises:
        OSError: it cannot be read.
    """
    if path.stat().st_size != file.size:
        return False
    if file.git_sha1:
        return git_sha1(read_bytes(path)) == file.git_sha1
    return file.sha256 is not None and file_sha256(path) == file.sha256
