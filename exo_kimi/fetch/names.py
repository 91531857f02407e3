"""A model's name in place of a directory: told apart from a path, and where its files are on this machine."""

from __future__ import annotations

import os
import re
from pathlib import Path

ENVIRONMENT_NAME = "EXO_KIMI_MODELS"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def model_of(text: str | Path) -> str | None:
    """ORG/NAME where a text is one and no such path exists; None for a directory, which wins."""
    name = str(text)
    if not _NAME.fullmatch(name) or ".." in name or "--" in name or Path(name).exists():
        return None
    return name


def models_directory() -> Path:
    """Where pulled models go when no directory was named: EXO_KIMI_MODELS, or in the user's data directory."""
    given = os.environ.get(ENVIRONMENT_NAME)
    if given:
        return Path(given).expanduser()
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "exo-kimi" / "models"


def directory_of(model: str) -> Path:
    """The directory of a pulled model."""
    return models_directory() / model
