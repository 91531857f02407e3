"""What `serve` was told about prefixes on disk, checked before anything is loaded."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TypedDict

from exo_kimi.errors import UsageError


class PrefixDiskOptions(TypedDict):
    """Of `ClusterOptions`."""

    prefix_disk_bytes: int
    prefix_directory: str | None


def prefix_disk_options(size_bytes: int | None, directory: Path | None, *, check: bool) -> PrefixDiskOptions:
    """What the stages may keep on their disks: nothing, unless a size was given.

    Args:
        size_bytes: of each stage.
        directory: on every machine; None takes the cache directory of each one's user.
        check: whether this machine, too, is to write there.

    Raises:
        UsageError: a directory without a size, or one that cannot be written.
    """
    if directory is None:
        return {"prefix_disk_bytes": size_bytes or 0, "prefix_directory": None}
    if not size_bytes:
        raise UsageError(
            "--prefix-dir without a size keeps nothing",
            found=directory,
            fix="also give --prefix-disk-bytes, such as 20GB for each stage",
        )
    directory = directory.expanduser().absolute()
    if check:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                pass
        except OSError as error:
            raise UsageError(
                "prefixes cannot be written there",
                expected="a directory that this user may write",
                found=error.strerror,
                where=f"--prefix-dir {directory}",
            ) from error
    return {"prefix_disk_bytes": size_bytes, "prefix_directory": str(directory)}
