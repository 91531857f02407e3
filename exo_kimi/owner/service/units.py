"""The files that make launchd and systemd start a service: both only say `exo-kimi service run NAME`.

Sources: launchd.plist(5); systemd.service(5), systemd.exec(5) and systemd.syntax(7), for what is quoted and how.
"""

from __future__ import annotations

import plistlib
import sys
from collections.abc import Sequence
from pathlib import Path

from exo_kimi.owner.service.spec import ServiceSpec

STOP_S = 15  # exo-kimi ends within 5 s by itself
RESTART_S = 10


def command(spec: ServiceSpec) -> list[str]:
    """What the service manager starts: this Python, so that an update of the environment is one of the service."""
    return [sys.executable, "-m", "exo_kimi", "service", "run", spec.name]


def launchd_plist(spec: ServiceSpec, words: Sequence[str], log: Path) -> bytes:
    """A launch agent: at login, and again whenever it ends.

    Args:
        spec: of the service.
        words: to start.
        log: takes what is said before the service's own log is open.
    """
    return plistlib.dumps(
        {
            "Label": spec.label,
            "ProgramArguments": list(words),
            "WorkingDirectory": spec.directory,
            "EnvironmentVariables": dict(spec.environment),
            "RunAtLoad": True,
            "KeepAlive": True,
            "ThrottleInterval": RESTART_S,
            "ExitTimeOut": STOP_S,
            "ProcessType": "Interactive",  # neither throttled nor put on the slow cores
            "Umask": 0o077,
            "StandardOutPath": str(log),
            "StandardErrorPath": str(log),
        }
    )


def systemd_unit(spec: ServiceSpec, words: Sequence[str]) -> str:
    """A user unit: with the user's first login (or at boot, with `loginctl enable-linger`), and again whenever it ends."""
    environment = "".join(f"Environment={_quoted(f'{name}={value}')}\n" for name, value in spec.environment.items())
    return f"""[Unit]
Description=exo-kimi {spec.name}

[Service]
ExecStart={" ".join(_quoted(word, dollars=True) for word in words)}
WorkingDirectory={_escaped(spec.directory)}
{environment}Restart=always
RestartSec={RESTART_S}
KillMode=mixed
TimeoutStopSec={STOP_S}
UMask=0077

[Install]
WantedBy=default.target
"""


def _escaped(text: str) -> str:
    return text.replace("%", "%%")


def _quoted(text: str, *, dollars: bool = False) -> str:
    """A word as systemd reads it back; `$` begins a variable in a command only."""
    escaped = _escaped(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return '"' + (escaped.replace("$", "$$") if dollars else escaped) + '"'
