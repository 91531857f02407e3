"""Services put in place, looked at and taken away again: what `exo-kimi service` does, as texts for the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from exo_kimi.errors import UsageError
from exo_kimi.owner.directories import OwnerDirectories
from exo_kimi.owner.service.manager import ServiceManager
from exo_kimi.owner.service.running import log_file, wired_limit_mb, wired_note
from exo_kimi.owner.service.spec import ServiceSpec, check_name, installed, kind_of, parse_environment, read_spec
from exo_kimi.planner.plan import read_plan

TAKEN_VARIABLES = ("PATH", "HF_HOME", "HF_ENDPOINT", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME")
"""A service manager gives hardly any of what a terminal has, and without these another model or key is found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Installation:
    """What `service install` was told.

    Args:
        words: of `exo-kimi`, read already as its command line would.
        name: None: that of the command.
        variables: `NAME=VALUE` each.
        directory: where it is to start.
    """

    words: tuple[str, ...]
    name: str | None = None
    variables: tuple[str, ...] = ()
    directory: Path


@dataclass(frozen=True, slots=True)
class Services:
    """The services of one user.

    Args:
        directories: where they lie.
        manager: starts them.
    """

    directories: OwnerDirectories
    manager: ServiceManager

    def install(self, asked: Installation, environment: Mapping[str, str], *, start: bool = True) -> list[str]:
        """Write a service and start it, now and at every login; what was done, line by line.

        Raises:
            UsageError: it cannot be a service, or would show a secret.
            PlanError: its plan cannot be read.
            MachineError: the manager refuses.
        """
        kind = kind_of(asked.words)
        taken = {name: environment[name] for name in TAKEN_VARIABLES if name in environment}
        spec = ServiceSpec(
            name=check_name(asked.name or kind[0]),
            words=asked.words,
            directory=str(asked.directory),
            environment={**taken, **parse_environment(asked.variables)},
            wired_limit_mb=planned_wired_mb(asked.words, asked.directory) or wired_limit_mb() or None,
        )
        spec.write(self.directories.services)
        unit = self.manager.write(spec)
        said = [f"wrote {unit}", f"logs: {log_file(spec.name, self.directories.logs)} (`exo-kimi logs {spec.name}`)"]
        if (note := wired_note(spec.wired_limit_mb, wired_limit_mb())) is not None:
            said.append(note)
        if start:
            self.manager.start(spec)
            said.append(
                f"started; `exo-kimi service status` shows it, `exo-kimi service uninstall {spec.name}` ends it"
            )
        if sys.platform != "darwin":
            said.append("it starts with your first login; `loginctl enable-linger` lets it start at boot")
        return said

    def status(self) -> list[str]:
        """A line for each service, and one more where its wired limit was lost."""
        lines = []
        for name in installed(self.directories.services):
            spec = read_spec(self.directories.services, name)
            state = self.manager.state(spec)
            process = f", process {state.pid}" if state.pid else ""
            last = f", last ended with status {state.last_status}" if state.last_status else ""
            lines.append(f"{name:<12} {state.state}{process}{last}: exo-kimi {' '.join(spec.words)}")
            if (note := wired_note(spec.wired_limit_mb, wired_limit_mb())) is not None:
                lines.append(f"{'':<12} {note}")
        return lines

    def only(self, name: str | None) -> str:
        """The name, or that of the only service.

        Raises:
            UsageError: there is none, or more than one.
        """
        names = installed(self.directories.services)
        if name is not None or len(names) == 1:
            return name or names[0]
        raise UsageError(
            "which service?", expected="its name", found=f"installed: {', '.join(names) or 'none'}", where="NAME"
        )

    def uninstall(self, name: str) -> list[str]:
        """Stop a service and remove its files; its logs stay.

        Raises:
            UsageError: there is none of this name.
        """
        spec = read_spec(self.directories.services, name)
        self.manager.stop(spec)
        self.manager.unit_path(spec).unlink(missing_ok=True)
        (self.directories.services / f"{name}.json").unlink(missing_ok=True)
        return [f"{name} is stopped and gone; its logs stay in {self.directories.logs}"]


def planned_wired_mb(words: Sequence[str], directory: Path) -> int | None:
    """The wired limit that this machine needs by the plan among the words: the server holds the first stage."""
    for index, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option == "--plan":
            path = Path(value) if equals else Path(words[index + 1])
            return read_plan(directory / path).stages[0].wired_limit_mb
    return None
