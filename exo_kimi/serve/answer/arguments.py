"""A call's arguments as an object, for doors that have no text for them."""

from __future__ import annotations

import json
from typing import Any

RAW_ARGUMENTS = (
    "_raw_arguments"  # what is no JSON object stands here, so that the client can tell the model what was wrong
)


def arguments_object(arguments: str) -> dict[str, Any]:
    """The JSON object in a call's arguments; text that is none becomes the value of `_raw_arguments`."""
    try:
        value = json.loads(arguments or "{}")
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {RAW_ARGUMENTS: arguments}
