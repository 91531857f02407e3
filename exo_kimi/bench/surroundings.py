"""Where figures were taken: the machine, the versions, the commit, the day. It measures nothing."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from exo_kimi.planner.machines.local import local_profile

_DISTRIBUTIONS = ("exo-kimi", "mlx", "mlx-lm", "numpy", "pyzmq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """Of one run; `commit` is None outside a checkout, and ends with `+` when files differ from it."""

    cpu: str
    memory_gib: float
    system: str
    python: str
    versions: dict[str, str]
    commit: str | None
    taken: str

    @classmethod
    def here(cls) -> Surroundings:
        """Of this process."""
        table = local_profile()
        return cls(
            cpu=_cpu_model() or table["chip"],
            memory_gib=table["memory_gib"],
            system=f"{platform.system()} {platform.release()}, {table['chip']}",
            python=platform.python_version(),
            versions={name: found for name in _DISTRIBUTIONS if (found := _version(name))},
            commit=_commit(Path(__file__).parent),
            taken=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )

    def facts(self) -> dict[str, str]:
        """Name and value of each, for people."""
        versions = ", ".join(f"{name} {found}" for name, found in self.versions.items())
        return {
            "processor": self.cpu,
            "memory": f"{self.memory_gib:.0f} GiB",
            "system": self.system,
            "versions": f"Python {self.python}, {versions}",
            "commit": self.commit or "not a checkout",
            "taken": self.taken,
        }

    def to_dict(self) -> dict[str, object]:
        """As part of a JSON document."""
        return asdict(self)


def _cpu_model() -> str | None:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return None  # the profile's chip tells
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(errors="replace"), re.MULTILINE)
    return found[1].strip() if found else None


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _commit(directory: Path) -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    answer = subprocess.run(
        [git, "-C", str(directory), "describe", "--always", "--abbrev=10", "--dirty=+"],
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.stdout.strip() or None
