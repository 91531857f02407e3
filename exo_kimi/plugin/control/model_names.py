"""exo's names of a model and of its directory.

Source: exo `ModelId.normalize` (`org--name`), and `get_eos_token_ids_for_model`, which knows a Kimi by its id alone.
"""

from __future__ import annotations

import re
from pathlib import Path

from exo_kimi.errors import UsageError

FAMILY = "kimi-k2"
LINEAR = (
    "kimi-linear"  # which exo knows no tokenizer of: its own engine cannot run the model, and ours asks it for none
)
# The only end of a turn that exo's own engine knows for it, whatever the tokenizer's files say.
# Source: exo `worker/engines/mlx/utils_mlx.py: get_eos_token_ids_for_model` at b5375f8ce.
EXO_END_TOKEN = 163586
_ORGANIZATION = "local"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def names_a_kimi(model_id: str) -> bool:
    """Whether an id is one of ours."""
    return FAMILY in model_id.lower() or LINEAR in model_id.lower()


def check_model_id(model_id: str) -> str:
    """The id, if exo will take it for a Kimi.

    Raises:
        UsageError: not `org/name`, or without `kimi-k2` or `kimi-linear`: exo then uses another tokenizer and never stops where a
            turn ends.
    """
    if not _ID.fullmatch(model_id) or "--" in model_id:
        raise UsageError(
            "not a model id of exo",
            expected="org/name, as mlx-community/Kimi-K2-Thinking",
            found=repr(model_id),
            fix="--model-id ORG/NAME",
        )
    if not names_a_kimi(model_id):
        raise UsageError(
            f"exo knows a Kimi by `{FAMILY}` in its id",
            expected=f"an id with {FAMILY}, in any case",
            found=model_id,
            fix=f"--model-id {model_id.split('/')[0]}/{FAMILY}-{model_id.split('/')[1]}",
        )
    return model_id


def default_model_id(directory: Path) -> str:
    """The id of a directory for which none was given: its own where exo would take that for a Kimi, else one made of its name.

    `lab--kimi-k2-mixed` is lab/kimi-k2-mixed, `lab--mixed` lab/kimi-k2-mixed, `K2 mixed` local/kimi-k2-K2-mixed, and a snapshot
    in Hugging Face's cache has the name of its repository.
    """
    path = directory.resolve()
    cached = path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--")
    name = path.parent.parent.name.removeprefix("models--") if cached else path.name
    organization, separator, rest = name.partition("--")
    owner, model = (organization, rest) if separator else (_ORGANIZATION, name)
    owner, model = _plain(owner) or _ORGANIZATION, _plain(model) or FAMILY
    return f"{owner}/{model}" if names_a_kimi(f"{owner}/{model}") else f"{owner}/{FAMILY}-{model}"


def _plain(text: str) -> str:
    """Text of the characters that an id may have; a double dash would be read as the end of the organization."""
    return re.sub(r"-{2,}", "-", re.sub(r"[^A-Za-z0-9._-]+", "-", text)).strip("-._")


def directory_name(model_id: str) -> str:
    """`org--name`, the directory that exo looks for."""
    return model_id.replace("/", "--")
