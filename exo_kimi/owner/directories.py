"""Where services, logs and reports lie on this machine, by its system's customs."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from exo_kimi.runtime.transport.keys import default_key_file


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerDirectories:
    """Folders of one user.

    Args:
        services: descriptions of installed services, readable by their owner only.
        logs: of services.
        units: where the system's service manager looks.
    """

    services: Path
    logs: Path
    units: Path

    @classmethod
    def here(cls) -> OwnerDirectories:
        """This user's: `~/Library` on macOS, the XDG folders elsewhere."""
        services = default_key_file().parent / "services"
        if sys.platform == "darwin":
            library = Path.home() / "Library"
            return cls(services=services, logs=library / "Logs" / "exo-kimi", units=library / "LaunchAgents")
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
        config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
        return cls(services=services, logs=state / "exo-kimi" / "logs", units=config / "systemd" / "user")


def private_folder(path: Path) -> Path:
    """The folder, made where it is missing, for its owner only."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path
