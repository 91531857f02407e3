"""What a node's process knows of its runners: that they live, and which engine each has.

A runner rewrites a small file of its own every second. exo itself only asks whether a runner's process exists, and waits for ever
for the answer of one that is frozen, or that pages.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)
FOLDER = "EXO_KIMI_BEATS"  # runners inherit it
BEAT_S = 1.0
FROZEN_S = 45.0  # before the other ranks give up (see `judge`), so that exo is told the name of the right one
_WATCH_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerReport:
    """One runner, as it says itself.

    Args:
        pid: its process.
        instance_id: exo's.
        model_id: exo's.
        rank: in the instance.
        engine: `exo-kimi` or `exo`.
        why: the reason, where it is exo's; how it works, where that is not as usual.
        waits_for: why it is not ready although it was; None when nothing is known against it.
        beat: a counter; 0 for one that does not beat.
    """

    pid: int
    instance_id: str
    model_id: str
    rank: int
    engine: str
    why: str | None = None
    waits_for: str | None = None
    beat: int = 0


class RunnerBeat:
    """Writes a runner's report.

    Args:
        report: how it begins.
        folder: of the node's process; None writes nothing.
    """

    def __init__(self, report: RunnerReport, folder: Path | None) -> None:
        self._report = report
        self._path = None if folder is None else folder / str(report.pid)
        self._lock = threading.Lock()
        self._beating = threading.Event()
        self._write()

    @classmethod
    def of_this_runner(cls, report: RunnerReport, environment: Mapping[str, str]) -> RunnerBeat:
        """Where this runner's node looks."""
        folder = environment.get(FOLDER)
        return cls(report, Path(folder) if folder else None)

    def tell(self, **changes: str | None) -> None:
        """Write what this runner waits for (`waits_for`), or how it works (`why`)."""
        self._write(**changes)

    def start(self) -> None:
        """Beat in a thread until the process ends; only from then on is silence a fault."""
        if self._beating.is_set():
            return
        self._beating.set()
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(BEAT_S):
                self.beat()

        threading.Thread(target=beat, name="exo-kimi-beat", daemon=True).start()

    def beat(self) -> None:
        """Once."""
        self._write(beat=self._report.beat + 1)

    def _write(self, **changes: Any) -> None:
        with self._lock:
            self._report = replace(self._report, **changes)
            if self._path is None:
                return
            with contextlib.suppress(OSError):  # a full disk ends no runner: without a first beat nobody counts them
                fresh = self._path.with_suffix(".new")
                fresh.write_text(json.dumps(asdict(self._report)))
                fresh.replace(self._path)


@dataclass(slots=True)
class _Seen:
    beat: int
    silent_s: float = 0.0


@dataclass(slots=True)
class RunnerWatch:
    """A node's side: reads the reports, and ends runners that stopped beating.

    Args:
        folder: where they are written; None until `begin`.
        children: gives the processes that this node has started and that live.
        kill: ends one.
    """

    folder: Path | None = None
    children: Callable[[], frozenset[int]] = field(default_factory=lambda: _living_children)
    kill: Callable[[int], None] = field(default_factory=lambda: _kill)
    _seen: dict[int, _Seen] = field(default_factory=dict)

    def begin(self, environment: MutableMapping[str, str]) -> None:
        """Watch in a thread until the process ends, in a new folder that runners inherit by the environment."""
        self.folder = Path(tempfile.mkdtemp(prefix="exo-kimi-beats-"))
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        environment[FOLDER] = str(self.folder)
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(_WATCH_S):
                self.look()

        threading.Thread(target=watch, name="exo-kimi-runner-watch", daemon=True).start()

    def look(self) -> None:
        """Count the silence of each by looks, so that a machine that slept ends nobody; end those frozen; forget the dead."""
        alive = self.children()
        for path in self._paths():
            report = _read(path)
            if report is None or report.pid not in alive:
                path.unlink(missing_ok=True)
                self._seen.pop(int(path.name), None)
                continue
            seen = self._seen.setdefault(report.pid, _Seen(report.beat))
            if seen.beat != report.beat or report.beat == 0:
                self._seen[report.pid] = _Seen(report.beat)
                continue
            seen.silent_s += _WATCH_S
            if seen.silent_s > FROZEN_S:
                logger.error(
                    "the runner %d of %s is frozen for %g s: it is ended", report.pid, report.model_id, FROZEN_S
                )
                self._seen[report.pid] = _Seen(report.beat)
                self.kill(report.pid)

    def reports(self) -> tuple[RunnerReport, ...]:
        """The runners of this node, by process; one that is silent says so."""
        alive = self.children()
        found = []
        for path in self._paths():
            report = _read(path)
            if report is not None and report.pid in alive:
                seen = self._seen.get(report.pid)
                frozen = seen is not None and seen.silent_s > 3 * BEAT_S
                found.append(replace(report, waits_for="its process is frozen") if frozen else report)
        return tuple(found)

    def _paths(self) -> list[Path]:
        """Of finished reports; none when somebody has cleaned up the temporary files."""
        if self.folder is None:
            return []
        try:
            return sorted(path for path in self.folder.iterdir() if not path.suffix)
        except OSError:
            return []


def _read(path: Path) -> RunnerReport | None:
    try:
        return RunnerReport(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _living_children() -> frozenset[int]:
    found = set()
    for child in multiprocessing.active_children():
        with contextlib.suppress(ValueError):  # exo has closed it in this moment
            if child.pid is not None:
                found.add(child.pid)
    return frozenset(found)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
