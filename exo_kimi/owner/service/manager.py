"""launchd and systemd, spoken to by their commands: a service written, started, asked after and taken away."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from exo_kimi.errors import MachineError
from exo_kimi.owner.directories import OwnerDirectories, private_folder
from exo_kimi.owner.service.spec import ServiceSpec
from exo_kimi.owner.service.units import command, launchd_plist, systemd_unit

COMMAND_S = 30.0
Call = Callable[[Sequence[str]], subprocess.CompletedProcess[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceState:
    """What the manager says: `state` in its own words, `pid` while it runs, and the exit status of the last end."""

    state: str
    pid: int | None = None
    last_status: int | None = None


class ServiceManager(Protocol):
    """Of one system."""

    def unit_path(self, spec: ServiceSpec) -> Path:
        """Where its file lies."""
        ...

    def write(self, spec: ServiceSpec) -> Path:
        """Write the unit; its path."""
        ...

    def start(self, spec: ServiceSpec) -> None:
        """Start it now and at every login; anew where it ran.

        Raises:
            MachineError: the manager refuses.
        """
        ...

    def stop(self, spec: ServiceSpec) -> None:
        """Stop it, for good."""
        ...

    def state(self, spec: ServiceSpec) -> ServiceState:
        """How it is now."""
        ...


def call(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command of the system.

    Raises:
        MachineError: it is not here, or does not end.
    """
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=COMMAND_S)
    except FileNotFoundError:
        raise MachineError(f"this machine has no {words[0]}", fix="start exo-kimi by hand") from None
    except subprocess.TimeoutExpired:
        raise MachineError(f"`{' '.join(words)}` did not end in {COMMAND_S:g} s") from None


class Launchd:
    """macOS.

    Args:
        directories: of the user.
        run: calls launchctl.
    """

    def __init__(self, directories: OwnerDirectories, run: Call = call) -> None:
        self._directories = directories
        self._run = run
        self._domain = f"gui/{os.getuid()}"

    def unit_path(self, spec: ServiceSpec) -> Path:
        """As `ServiceManager`."""
        return self._directories.units / f"{spec.label}.plist"

    def write(self, spec: ServiceSpec) -> Path:
        """As `ServiceManager`."""
        log = private_folder(self._directories.logs) / f"{spec.name}.launchd.log"
        path = self.unit_path(spec)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(launchd_plist(spec, command(spec), log))
        path.chmod(0o600)
        return path

    def start(self, spec: ServiceSpec) -> None:
        """As `ServiceManager`."""
        self.stop(spec)
        _check(self._run(["launchctl", "bootstrap", self._domain, str(self.unit_path(spec))]))

    def stop(self, spec: ServiceSpec) -> None:
        """As `ServiceManager`."""
        self._run(["launchctl", "bootout", f"{self._domain}/{spec.label}"])  # refused where it does not run

    def state(self, spec: ServiceSpec) -> ServiceState:
        """As `ServiceManager`."""
        answer = self._run(["launchctl", "print", f"{self._domain}/{spec.label}"])
        if answer.returncode:
            return ServiceState(state="not loaded")
        found = dict(re.findall(r"^\t(state|pid|last exit code) = (.+)$", answer.stdout, re.MULTILINE))
        return ServiceState(
            state=found.get("state", "unknown"),
            pid=_number(found.get("pid")),
            last_status=_number(found.get("last exit code")),
        )


class Systemd:
    """Linux, the user's own manager.

    Args:
        directories: of the user.
        run: calls systemctl.
    """

    def __init__(self, directories: OwnerDirectories, run: Call = call) -> None:
        self._directories = directories
        self._run = run

    def unit_path(self, spec: ServiceSpec) -> Path:
        """As `ServiceManager`."""
        return self._directories.units / f"{spec.label}.service"

    def write(self, spec: ServiceSpec) -> Path:
        """As `ServiceManager`."""
        path = self.unit_path(spec)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(systemd_unit(spec, command(spec)))
        path.chmod(0o600)
        return path

    def start(self, spec: ServiceSpec) -> None:
        """As `ServiceManager`."""
        _check(self._systemctl("daemon-reload"))
        _check(self._systemctl("enable", f"{spec.label}.service"))
        _check(self._systemctl("restart", f"{spec.label}.service"))

    def stop(self, spec: ServiceSpec) -> None:
        """As `ServiceManager`."""
        self._systemctl("disable", "--now", f"{spec.label}.service")

    def state(self, spec: ServiceSpec) -> ServiceState:
        """As `ServiceManager`."""
        answer = self._systemctl("show", f"{spec.label}.service", "-p", "ActiveState,SubState,MainPID,ExecMainStatus")
        if answer.returncode:
            return ServiceState(state=f"unknown ({answer.stderr.strip() or 'systemd does not answer'})")
        found = dict(line.split("=", 1) for line in answer.stdout.splitlines() if "=" in line)
        return ServiceState(
            state=f"{found.get('ActiveState', 'unknown')} ({found.get('SubState', '')})",
            pid=_number(found.get("MainPID")) or None,
            last_status=_number(found.get("ExecMainStatus")),
        )

    def _systemctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self._run(["systemctl", "--user", *words])


def manager_here(directories: OwnerDirectories) -> ServiceManager:
    """The manager of this system."""
    return Launchd(directories) if sys.platform == "darwin" else Systemd(directories)


def _check(answer: subprocess.CompletedProcess[str]) -> None:
    if answer.returncode:
        raise MachineError(
            f"`{' '.join(map(str, answer.args))}` failed with status {answer.returncode}",
            found=(answer.stderr or answer.stdout).strip(),
            fix="its files are written: mend what it says and install again",
        )


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.strip().lstrip("-").isdigit() else None
