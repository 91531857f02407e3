"""The logs of services, read back: the last lines, those of one request or of a level, and those to come."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from exo_kimi.errors import UsageError
from exo_kimi.logs import LEVELS, LogLine

FOLLOW_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class LogQuery:
    """Which lines.

    Args:
        lines: the last so many; None: all.
        request: those that name this request (`x-request-id`), or begin so.
        level: this one and worse.
    """

    lines: int | None = 50
    request: str | None = None
    level: str | None = None

    def __post_init__(self) -> None:
        if self.level is not None and self.level not in LEVELS:
            raise UsageError("no such level", expected=", ".join(LEVELS), found=self.level, where="--level")

    def takes(self, text: str) -> bool:
        """Whether a line is one of them."""
        if self.request is not None and self.request not in text:
            return False
        if self.level is None:
            return True
        level = LogLine.of(text).level
        return level is not None and LEVELS.index(level) >= LEVELS.index(self.level)


def log_files(name: str, folder: Path) -> list[Path]:
    """The files of a service's log, oldest first."""
    numbered = [path for path in folder.glob(f"{name}.log.*") if path.suffix[1:].isdigit()]
    found = sorted(numbered, key=lambda path: -int(path.suffix[1:]))
    newest = folder / f"{name}.log"
    return [*found, *([newest] if newest.exists() else [])]


def read_log(name: str, folder: Path, query: LogQuery) -> list[str]:
    """The lines of a service's log.

    Raises:
        UsageError: it has none.
    """
    files = log_files(name, folder)
    if not files:
        raise UsageError(
            f"there is no log of {name!r}", where=folder, fix="`exo-kimi service status` lists the services"
        )
    found: deque[str] = deque(maxlen=query.lines)
    for path in files:
        with path.open(encoding="utf-8", errors="replace") as stream:
            found.extend(text for line in stream if query.takes(text := line.rstrip("\n")))
    return list(found)


def follow_log(name: str, folder: Path, query: LogQuery) -> Iterator[str]:
    """Lines as they are written from now on, through rotations; without an end."""
    path = folder / f"{name}.log"
    stream = path.open(encoding="utf-8", errors="replace")
    stream.seek(0, 2)
    part = ""
    while True:
        read = stream.readline()
        if read:
            part += read
            if part.endswith("\n"):
                text, part = part.rstrip("\n"), ""
                if query.takes(text):
                    yield text
            continue
        try:
            turned = path.stat().st_ino != os.fstat(stream.fileno()).st_ino
        except FileNotFoundError:
            turned = False  # between two files
        if turned:
            stream.close()
            stream = path.open(encoding="utf-8", errors="replace")
        else:
            time.sleep(FOLLOW_S)
