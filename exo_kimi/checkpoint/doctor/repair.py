"""Write what the doctor could derive: config files, the index, a chat template; never a weight.

Every file is first copied to NAME.bak-<n> and then replaced in one step, so a crash leaves the old or the new one.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from exo_kimi.checkpoint.doctor.deep import Progress
from exo_kimi.checkpoint.doctor.doctor import diagnose, examine_directory
from exo_kimi.checkpoint.doctor.findings import Change, Diagnosis, Remedy
from exo_kimi.checkpoint.text_files import read_bytes
from exo_kimi.errors import UsageError


def repair(
    directory: str | Path, *, deep: bool = False, sha256: Path | None = None, progress: Progress | None = None
) -> Diagnosis:
    """Repair what can be derived, and examine what is left. A second repair changes nothing more.

    Args:
        directory: a checkpoint directory.
        deep: also read the weights, after the repair.
        sha256, progress: see `doctor`.

    Returns:
        What was changed, and what is still wrong.

    Raises:
        NotACheckpointError: there is no such directory.
        UsageError: a file cannot be written, or the list of hashes cannot be read.
    """
    root = Path(directory)
    checkup = examine_directory(root)
    changes = [_apply(root, remedy) for remedy in checkup.remedies.values()]
    if changes or deep or sha256 is not None:
        checkup = examine_directory(root, deep=deep, sha256=sha256, progress=progress)
    return diagnose(root, checkup, deep=deep or sha256 is not None, changes=changes)


def _apply(root: Path, remedy: Remedy) -> Change:
    path = root / remedy.file
    try:
        backup = _back_up(path)
        _replace(path, remedy.content)
    except OSError as error:
        raise UsageError(
            f"{remedy.file} cannot be written",
            found=error.strerror,
            where=path,
            fix="make the directory writable, or copy the checkpoint to one that is",
        ) from error
    return Change(file=remedy.file, backup=backup, changes=remedy.changes)


def _back_up(path: Path) -> str | None:
    """Copy a file beside itself under the first free number; an older backup is never overwritten."""
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        return None
    number = 1
    while True:
        backup = path.with_name(f"{path.name}.bak-{number}")
        try:
            with backup.open("xb") as stream:
                stream.write(content)
                os.fsync(stream.fileno())
        except FileExistsError:
            number += 1
            continue
        return backup.name


def _replace(path: Path, content: bytes) -> None:
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o644
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    draft = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        draft.chmod(mode)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
