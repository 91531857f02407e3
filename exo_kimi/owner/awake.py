"""A machine that does not fall asleep by itself while it serves: `caffeinate` on macOS, `systemd-inhibit` on Linux.

Both end with the process that they watch, also when it is killed. A lid that is closed on battery puts a machine to sleep
all the same.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

KEPT_ENVIRONMENT_NAME = "EXO_KIMI_KEPT_AWAKE"
"""Set for the command of a service, which keeps the machine awake for it."""
SAYS_IN_S = 2.0  # what keeps the machine awake says within this time that it cannot


def awake_command(pid: int) -> list[str] | None:
    """What keeps this machine awake for as long as a process lives; None where nothing can."""
    if sys.platform == "darwin":
        return ["/usr/bin/caffeinate", "-i", "-s", "-w", str(pid)]
    if shutil.which("systemd-inhibit") is None:
        return None
    inhibit = ["systemd-inhibit", "--what=sleep:idle", "--who=exo-kimi", "--why=it serves", "--mode=block"]
    return [*inhibit, "tail", f"--pid={pid}", "-f", "/dev/null"]


@contextlib.contextmanager
def kept_awake(pid: int, say: Callable[[str], None]) -> Iterator[None]:
    """Keep the machine awake within the block, and no longer than a process lives.

    Args:
        pid: of the process.
        say: told why the machine may fall asleep, where nothing keeps it awake.
    """
    words = awake_command(pid)
    process = None
    if words is not None:
        with contextlib.suppress(OSError):
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
    if process is None:
        say(f"nothing keeps this machine awake: there is no {words[0] if words else 'systemd-inhibit'}")
        yield
        return
    threading.Thread(target=_watch, args=(process, say), daemon=True).start()
    try:
        yield
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=SAYS_IN_S)


@contextlib.contextmanager
def awake_while_serving(pid: int, *, already_kept: bool, say: Callable[[str], None]) -> Iterator[None]:
    """`kept_awake` for a command that a person typed.

    Args:
        pid: of the command's process.
        already_kept: it is a service's command, and the service does it.
        say: told on a Mac where it cannot be done. Elsewhere a machine that serves is seldom one that sleeps.
    """
    if already_kept:
        yield
        return
    with kept_awake(pid, say if sys.platform == "darwin" else _say_nothing):
        yield


def _say_nothing(_: str) -> None:
    """Nobody wants to know."""


def _watch(process: subprocess.Popen[str], say: Callable[[str], None]) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        _, said = process.communicate(timeout=SAYS_IN_S)
        if process.returncode > 0:
            say(f"nothing keeps this machine awake: {said.strip()}")
