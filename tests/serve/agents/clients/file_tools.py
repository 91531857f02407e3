"""The two tools of the Python agents, as plain functions and as OpenAI declares them."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def read_file(path: str) -> str:
    """Read a file."""
    return Path(path).read_text()


def edit_file(path: str, old: str, new: str) -> str:
    """Replace text in a file."""
    file = Path(path)
    file.write_text(file.read_text().replace(old, new))
    return "edited"


def _declared(name: str, *fields: str) -> dict[str, Any]:
    properties = {field: {"type": "string"} for field in fields}
    parameters = {"type": "object", "properties": properties, "required": list(fields), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": f"{name}.", "parameters": parameters}}


DECLARED = [_declared("read_file", "path"), _declared("edit_file", "path", "old", "new")]
CALLABLE = {"read_file": read_file, "edit_file": edit_file}
