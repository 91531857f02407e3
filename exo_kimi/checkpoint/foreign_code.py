"""What in a checkpoint runs as code in other programs: Python files, and the keys that name them. exo-kimi runs none of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MODEL_FILE_KEY = "model_file"  # mlx-lm runs the file that it names, unasked (`utils.py: load_model`)
CODE_KEYS = frozenset(
    {MODEL_FILE_KEY, "auto_map", "custom_pipelines"}
)  # the others: transformers, with trust_remote_code


def code_keys(value: object, path: str = "") -> Iterator[str]:
    """Where a JSON value names code, such as `text_config.auto_map`."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            where = f"{path}.{key}" if path else str(key)
            if key in CODE_KEYS and item is not None:
                yield where
            else:
                yield from code_keys(item, where)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from code_keys(item, f"{path}[{index}]")


def without_code(value: Any) -> Any:
    """The same JSON value without the keys that name code."""
    if isinstance(value, Mapping):
        return {key: without_code(item) for key, item in value.items() if key not in CODE_KEYS}
    if isinstance(value, list):
        return [without_code(item) for item in value]
    return value


def code_files(directory: Path) -> list[str]:
    """Names of the Python files of a directory and of the folders in it."""
    return sorted(str(path.relative_to(directory)) for level in ("*.py", "*/*.py") for path in directory.glob(level))
