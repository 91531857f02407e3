"""Files that hold a secret: readable by their owner only."""

from __future__ import annotations

import stat
from pathlib import Path

from exo_kimi.checkpoint.text_files import read_bytes
from exo_kimi.errors import UsageError

_MOST_BYTES = 4096


def read_secret(path: Path, *, fix: str | None = None) -> str:
    """The text of a key file; bytes that are not ASCII become U+FFFD, which no key has.

    Raises:
        UsageError: it cannot be read, is no regular file or far too long, or others may read it too.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            raise UsageError(
                "other users may read the key file",
                expected="mode 600",
                found=f"mode {mode:o}",
                where=path,
                fix=f"chmod 600 {path}, or make a new key if others have read it",
            )
        return read_bytes(path, most_bytes=_MOST_BYTES).decode("ascii", errors="replace")
    except OSError as error:
        raise UsageError("cannot read the key file", found=error.strerror, where=path, fix=fix) from error
