"""A stage's prefixes on its disk: written by a thread of their own, never waited for. What to keep is the leader's to decide.

Keys are set beforehand by the leader; the directory's name binds what else a cache depends on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from queue import Empty, Full, Queue

from exo_kimi.checkpoint.safetensors_io import StoredTensor
from exo_kimi.runtime.stage.prefix_files import BlockFiles, DamagedBlockError

logger = logging.getLogger(__name__)
QUEUED_BLOCKS = 32  # a K2 stage's block takes some 10 MB
FILE_OVERHEAD_BYTES = 8192  # header, and what a file system rounds up to
CLOSE_S = 2.0
Changed = Callable[[tuple[str, ...], tuple[str, ...]], None]
"""Takes the keys that are on the disk from now on, and those that are not; called from both threads."""


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


class PrefixDisk:
    """Blocks of one stage on its disk.

    Args:
        parent: of the stage's directory.
        identity: see `cache_identity`; the directory's name.
        block_bytes: of one block's arrays.
        disk_bytes: the budget.
        changed: told of every block that was to be written, once, and of every one that turned out to be lost.

    Raises:
        OSError: the directory cannot be made or listed.
    """

    def __init__(self, parent: Path, identity: str, *, block_bytes: int, disk_bytes: int, changed: Changed) -> None:
        self.files = BlockFiles(parent / identity, identity)
        self.capacity_blocks = disk_bytes // (block_bytes + FILE_OVERHEAD_BYTES)
        self._changed = changed
        self._keys = dict.fromkeys(self.files.prepare())
        self.files.delete_unused_siblings()
        self.drop(list(self._keys)[: max(0, len(self._keys) - self.capacity_blocks)])
        self._full = False
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
            if self._full or len(self._keys) + self._queue.qsize() >= self.capacity_blocks:
                raise Full
            self._queue.put_nowait((key, tensors))
        except Full:
            self._changed((), (key,))

    def read(self, key: str) -> dict[str, StoredTensor] | None:
        """A block; None, after it was deleted and told of, when it is not what was written."""
        try:
            return self.files.read(key)
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

    def _write_all(self) -> None:
        while (item := self._queue.get()) is not None:
            key, tensors = item
            try:
                if not self._full:
                    self.files.write(key, tensors)
                    self._keys[key] = None
            except OSError as error:
                self._full = True
                logger.warning(
                    "prefixes are no longer written to %s: %s. Those in memory go on working; "
                    "free some space and start the stage again",
                    self.files.directory,
                    error.strerror or error,
                )
            self._changed(*(((key,), ()) if key in self._keys else ((), (key,))))
            self._queue.task_done()
