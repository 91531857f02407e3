"""exo's names of a model and of its directory.

Source: exo `ModelId.normalize` (`org--name`), and `get_eos_token_ids_for_model`, which knows a Kimi by its id alone.
"""

from __future__ import annotations

import re
from pathlib import Path

from exo_kimi.errors import UsageError

FAMILY = "kimi-k2"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def check_model_id(model_id: str) -> str:
    """The id, if exo will take it for a Kimi.

    Raises:
        UsageError: not `org/name`, or without `kimi-k2`: exo then uses another tokenizer and never stops at a turn's end.
    """
    if not _ID.fullmatch(model_id) or "--" in model_id:
        raise UsageError(
            "not a model id of exo",
            expected="org/name, as mlx-community/Kimi-K2-Thinking",
            found=repr(model_id),
            fix="--model-id ORG/NAME",
        )
    if FAMILY not in model_id.lower():
        raise UsageError(
            f"exo knows a Kimi by `{FAMILY}` in its id",
            expected=f"an id with {FAMILY}, in any case",
            found=model_id,
            fix=f"--model-id {model_id.split('/')[0]}/{FAMILY}-{model_id.split('/')[1]}",
        )
    return model_id


def directory_name(model_id: str) -> str:
    """`org--name`, the directory that exo looks for."""
    return model_id.replace("/", "--")


def model_id_of(directory: Path) -> str | None:
    """`org/name` of a directory that is named as exo wants it, or lies in one named `org`; None when it is neither."""
    name = directory.name.replace("--", "/", 1)
    return name if _ID.fullmatch(name) else None
