"""A user's systemd of its own, in a home, a control group and a mount namespace of its own: as after a login."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

# It runs only where the system's systemd is said to run, or does.
LOGIN = """
echo $$ > "$1/cgroup.procs"
if [ -n "$2" ]; then echo $$ > "$2/cgroup.procs"; fi
if [ ! -d /run/systemd/system ]; then
    mount --make-rprivate / && mkdir -p /run/systemd && mount -t tmpfs none /run/systemd && mkdir -p /run/systemd/system
fi
exec systemd --user
"""


@dataclass
class UserSystemd:
    """One user's manager.

    Args:
        root: holds its home and the runtime directory.
        groups: its control groups, the unified one first.
    """

    root: Path
    groups: tuple[Path, ...]
    manager: subprocess.Popen[bytes] | None = None

    @property
    def home(self) -> Path:
        return self.root / "home"

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "DBUS_"))}
        return {**kept, "HOME": str(self.home), "XDG_RUNTIME_DIR": str(self.root / "run")}

    def login(self) -> None:
        """The first login: the manager starts what it is to start."""
        groups = [*map(str, self.groups), ""][:2]
        with (self.root / "systemd.log").open("ab") as log:
            self.manager = subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", LOGIN, "login", *groups],
                env=self.environment,
                stdout=log,
                stderr=log,
            )
        until_s = time.monotonic() + 30
        while self.run(["systemctl", "--user", "is-system-running"]).stdout.strip() not in ("running", "degraded"):
            if self.manager.poll() is not None or time.monotonic() > until_s:
                pytest.skip(f"no user's systemd here: {(self.root / 'systemd.log').read_text()[-300:]}")
            time.sleep(0.1)

    def logout(self) -> None:
        """The last logout: everything ends."""
        if self.manager is not None:
            self.manager.terminate()
            self.manager.wait(30)
            self.manager = None

    def run(self, words: Sequence[str], *, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """A command in a terminal of the user, who must be logged in."""
        assert self.manager is not None
        return subprocess.run(
            ["nsenter", f"--target={self.manager.pid}", "--mount", f"--wd={cwd or self.root}", *words],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )


@contextmanager
def user_systemd() -> Iterator[UserSystemd]:
    """A user who is logged in; skipped where a test may not make one."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("systemd", "systemctl", "unshare", "nsenter"))):
        pytest.skip("a user's systemd of our own needs root, systemd and unshare")
    name = f"exo-kimi-test-{os.getpid()}"
    groups = tuple(mount / name for mount in _group_mounts())
    root = Path(tempfile.mkdtemp(prefix="ek-"))  # short: sockets' paths are
    user = UserSystemd(root, groups)
    try:
        for folder in (user.home, root / "run"):
            folder.mkdir(mode=0o700)
        try:
            for group in groups:
                group.mkdir()
        except OSError as error:
            pytest.skip(f"no control group can be made here: {error}")
        user.login()
        yield user
    finally:
        user.logout()
        for group in groups:
            _remove(group)
        shutil.rmtree(root, ignore_errors=True)


def _group_mounts() -> list[Path]:
    """Where control groups are made: the unified hierarchy, and the one by which an older layout names systemd's."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    unified = [Path(mount[1]) for mount in mounts if mount[2] == "cgroup2"]
    named = [Path(mount[1]) for mount in mounts if mount[2] == "cgroup" and "name=systemd" in mount[3].split(",")]
    if not unified:
        pytest.skip("no unified control groups here")
    return [unified[0], *named[:1]]


def _remove(group: Path) -> None:
    """End what is left in a group of ours, and remove it."""
    with suppress(OSError):
        (group / "cgroup.kill").write_text("1")
        time.sleep(0.2)
    for folder, _, _ in os.walk(group, topdown=False):
        with suppress(OSError):
            Path(folder).rmdir()
