"""Installed versions of what must agree between members, read from metadata without importing anything."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True, slots=True, kw_only=True)
class Versions:
    """Of one process."""

    exo_kimi: str
    mlx: str
    mlx_lm: str

    @classmethod
    def installed(cls) -> Versions:
        """What this Python has; `unknown` for what runs from a source tree."""
        return cls(exo_kimi=_version("exo-kimi"), mlx=_version("mlx"), mlx_lm=_version("mlx-lm"))


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"
