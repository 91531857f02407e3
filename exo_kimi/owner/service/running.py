"""The body of a service, `exo-kimi service run NAME`: its command as a child, whose lines go into a log of bounded size.

It ends when the child does, with the child's status, and the service manager starts both again. While the child lives, the
machine does not fall asleep by itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO

from exo_kimi.logs import TEXT_FORMAT
from exo_kimi.owner.awake import KEPT_ENVIRONMENT_NAME, kept_awake
from exo_kimi.owner.directories import private_folder
from exo_kimi.owner.service.spec import ServiceSpec

LOG_BYTES = 8 << 20
LOGS_KEPT = 5
END_S = 10.0  # exo-kimi's commands end within 5 s of the first signal
LINE_BYTES = 1 << 16
CHILD = "exo_kimi.owner.service.child"

logger = logging.getLogger(__name__)


def run_service(spec: ServiceSpec, folder: Path, *, command: Sequence[str] | None = None) -> int:
    """Run it until it ends or a signal ends it.

    Args:
        spec: what to run.
        folder: for its log.
        command: what runs in place of `exo-kimi WORDS`, for tests.

    Returns:
        The child's exit status, 128 and more where a signal ended it.
    """
    log = service_log(spec, folder)
    try:
        if (note := wired_note(spec.wired_limit_mb, wired_limit_mb())) is not None:
            logger.warning(note)
        words = [sys.executable, "-m", "exo_kimi", *spec.words] if command is None else list(command)
        child = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=spec.directory,
            env={**os.environ, **spec.environment, "PYTHONUNBUFFERED": "1", KEPT_ENVIRONMENT_NAME: "1"},
        )
        assert child.stdout is not None
        logger.info("service %s: process %d begins", spec.name, child.pid)
        reader = threading.Thread(target=_copy_lines, args=(child.stdout, log), daemon=True)
        reader.start()
        with _signals_to(child), kept_awake(child.pid, logger.warning):
            status = child.wait()
        reader.join(timeout=2.0)  # what the child left behind may hold the pipe
        logger.info("service %s: process %d ended with status %d", spec.name, child.pid, status)
    finally:
        logging.getLogger().removeHandler(log)
        log.close()
    return status if status >= 0 else 128 - status


def service_log(spec: ServiceSpec, folder: Path) -> RotatingFileHandler:
    """The log of a service, to which this process' own lines go too."""
    log = _PrivateLog(
        log_file(spec.name, folder),
        maxBytes=LOG_BYTES,
        backupCount=LOGS_KEPT - 1,
        encoding="utf-8",
        errors="backslashreplace",
    )
    log.setFormatter(_ServiceLines(TEXT_FORMAT))
    root = logging.getLogger()
    root.addHandler(log)
    root.setLevel(logging.INFO)
    logging.raiseExceptions = False  # a full disk is no reason to end
    return log


def log_file(name: str, folder: Path) -> Path:
    """The newest of its files; older ones have `.1`, `.2` and so on behind."""
    return private_folder(folder) / f"{name}.log"


def wired_note(wanted_mb: int | None, found_mb: int | None) -> str | None:
    """What to say when a Mac's wired limit is not what a plan counts on: macOS forgets it when it restarts."""
    if wanted_mb is None or found_mb is None or found_mb >= wanted_mb:
        return None
    now = f"{found_mb} MB" if found_mb else "macOS' default"
    return (
        f"the wired limit of this Mac is {now} and not {wanted_mb} MB, as after a restart. "
        f"Mend it with: sudo sysctl iogpu.wired_limit_mb={wanted_mb}"
    )


def wired_limit_mb() -> int | None:
    """`iogpu.wired_limit_mb` now, 0 where macOS decides; None where there is no such thing."""
    if platform.system() != "Darwin":
        return None
    asked = subprocess.run(["sysctl", "-n", "iogpu.wired_limit_mb"], capture_output=True, text=True, check=False)
    return int(asked.stdout) if asked.returncode == 0 and asked.stdout.strip().isdigit() else None


@contextlib.contextmanager
def _signals_to(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """SIGTERM and Ctrl-C go on to the child; a child that does not end of it is killed."""

    def forward(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(number)
        timer = threading.Timer(END_S, child.kill)
        timer.daemon = True
        timer.start()

    if threading.current_thread() is not threading.main_thread():  # signals are not ours
        yield
        return
    former = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _copy_lines(stream: IO[bytes], log: RotatingFileHandler) -> None:
    while line := stream.readline(LINE_BYTES):
        text = line.decode(errors="replace").rstrip("\r\n")
        log.handle(logging.LogRecord(CHILD, logging.INFO, "", 0, text, None, None))


class _PrivateLog(RotatingFileHandler):
    """Files for their owner alone."""

    def _open(self) -> TextIOWrapper:
        os.close(os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        return super()._open()


class _ServiceLines(logging.Formatter):
    """The child's lines as they are: they have their own time, where they have one."""

    def format(self, record: logging.LogRecord) -> str:
        return record.getMessage() if record.name == CHILD else super().format(record)
