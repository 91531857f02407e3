"""What is done of an output: sizes and SHA-256 of its files, on disk before each file gets its name."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import exo_kimi
from exo_kimi.checkpoint.text_files import read_json
from exo_kimi.compress.output.job import JOURNAL_NAME, MANIFEST_NAME, OutputJob
from exo_kimi.errors import UsageError

PART = ".part"
_BLOCK_BYTES = 2**20


@dataclass(slots=True)
class Journal:
    """The files of one output that are written and verified.

    Args:
        job: the output.
        files: name -> `{"bytes": ..., "sha256": ...}`, `sha256` None for a link.
    """

    job: OutputJob
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def is_done(self, name: str) -> bool:
        """Whether a file is there as it was verified, by its size."""
        path = self.job.directory / name
        return name in self.files and path.is_file() and path.stat().st_size == self.files[name]["bytes"]

    def note(self, name: str, size: int, sha256: str | None) -> None:
        """Remember a verified file; it may get its name only after this."""
        self.files[name] = {"bytes": size, "sha256": sha256}
        write_whole(self.job.directory / JOURNAL_NAME, self._text())

    def save(self) -> None:
        """Make sure that the directory says whose it is."""
        write_whole(self.job.directory / JOURNAL_NAME, self._text())

    @property
    def is_open(self) -> bool:
        """Whether it is on disk: a run may have been killed with everything done but this."""
        return (self.job.directory / JOURNAL_NAME).exists()

    def finish(self) -> None:
        """The journal becomes the manifest: the output is whole."""
        write_whole(self.job.directory / MANIFEST_NAME, self._text())
        (self.job.directory / JOURNAL_NAME).unlink(missing_ok=True)

    def _text(self) -> str:
        stated = {
            "made_by": f"exo-kimi {exo_kimi.__version__}",
            "kind": self.job.kind,
            "job": self.job.hash,
            **self.job.meaning,
            "files": dict(sorted(self.files.items())),
        }
        return json.dumps(stated, indent=2, ensure_ascii=False) + "\n"


def open_journal(job: OutputJob) -> Journal:
    """What an earlier run of the job did, in a directory that is there.

    Raises:
        UsageError: the directory holds anything else.
        OSError: it cannot be read or written.
    """
    for name in (MANIFEST_NAME, JOURNAL_NAME):
        path = job.directory / name
        if path.exists():
            return Journal(job, _files_of(path, job))
    present = sorted(path.name for path in job.directory.iterdir() if path.suffix != PART)
    if present:
        raise UsageError(
            "the output directory is not empty",
            expected="a new or empty directory, or one of an interrupted run",
            found=", ".join(present[:5]),
            where=job.directory,
            fix="give another directory",
        )
    journal = Journal(job)
    journal.save()
    return journal


def _files_of(path: Path, job: OutputJob) -> dict[str, dict[str, Any]]:
    try:
        stated = read_json(path)
        files = {str(name): {"bytes": int(f["bytes"]), "sha256": f["sha256"]} for name, f in stated["files"].items()}
        found = stated["job"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path.name} cannot be read", found=error, where=path, fix="delete the directory, or give another"
        ) from None
    if found != job.hash:
        raise UsageError(
            "the output directory is of another run",
            expected=_differences(job.meaning, stated) or f"{job.kind}: {job.hash[:19]}",
            found=_differences(stated, job.meaning, keys=job.meaning) or f"{stated.get('kind')}: {str(found)[:19]}",
            where=job.directory,
            fix="give another directory, or the same source and options",
        )
    return files


def _differences(one: Mapping[str, Any], other: Mapping[str, Any], *, keys: Mapping[str, Any] | None = None) -> str:
    differ = [key for key in keys or one if one.get(key) != other.get(key)]
    return ", ".join(f"{key} {json.dumps(one.get(key))[:60]}" for key in differ)


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file so that a reader sees all of it or what was there before.

    Raises:
        OSError: it cannot be written.
    """
    part = path.with_name(path.name + PART)
    with part.open("wb") as stream:
        stream.write(data.encode() if isinstance(data, str) else data)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(path)


def copy_whole(source: Path, path: Path) -> tuple[int, str]:
    """Copy a file so that a reader sees all of it or what was there before; returns its bytes and SHA-256.

    Raises:
        OSError: it cannot be read or written.
    """
    part, digest, size = path.with_name(path.name + PART), hashlib.sha256(), 0
    with source.open("rb") as origin, part.open("wb") as stream:
        while block := origin.read(_BLOCK_BYTES):
            stream.write(block)
            digest.update(block)
            size += len(block)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(path)
    return size, digest.hexdigest()
