"""The JSON files of a checkpoint directory, and config.json as what it says or as a Kimi's configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from exo_kimi.arch.config import KimiConfig
from exo_kimi.errors import ConfigError, NotACheckpointError

CONFIG_NAME = "config.json"


def read_json(path: Path) -> Any:
    """Parse one JSON file in UTF-8; a byte order mark in front, as some editors write it, is skipped.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8, not JSON, or nested too deep to parse.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise ValueError("its lists and objects are nested too deep") from None


def read_config(directory: str | Path) -> dict[str, Any]:
    """Parse the `config.json` of a checkpoint directory, and check nothing in it.

    Raises:
        NotACheckpointError: no such directory, or no config.json in it.
        ConfigError: the file is not a JSON object.
    """
    root = Path(directory)
    if not root.is_dir():
        raise NotACheckpointError(
            "no such checkpoint directory", found=root, fix="give the folder that holds config.json and *.safetensors"
        )
    path = root / CONFIG_NAME
    try:
        raw = read_json(path)
    except FileNotFoundError:
        raise NotACheckpointError(
            "no config.json in the directory",
            where=root,
            fix="give the folder that holds config.json and *.safetensors",
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError("config.json cannot be read", found=error, where=path, fix="copy the file again") from None
    if not isinstance(raw, dict):
        raise ConfigError("config.json is not an object", expected="{...}", found=type(raw).__name__, where=path)
    return raw


def read_kimi_config(directory: str | Path) -> KimiConfig:
    """Read `config.json` of a checkpoint directory as the configuration of a Kimi.

    Raises:
        NotACheckpointError: no such directory or no config.json in it.
        ConfigError, UnsupportedModelError, CheckpointProblems: see `KimiConfig.from_dict`.
    """
    return KimiConfig.from_dict(read_config(directory), where=Path(directory) / CONFIG_NAME)
