"""The key that clients of the API send: from a file, the environment, or the command line."""

from __future__ import annotations

import logging
from pathlib import Path

from exo_kimi.errors import UsageError
from exo_kimi.runtime.transport.secret_files import read_secret

ENVIRONMENT_NAME = "EXO_KIMI_API_KEY"
_FIX = f"chmod 600 FILE and --api-key-file FILE, or {ENVIRONMENT_NAME}"

log = logging.getLogger(__name__)


def find_api_key(*, key_file: Path | None, option: str | None, environment_text: str | None) -> str | None:
    """The key of `--api-key-file`, of `--api-key` or of the environment; None when there is none.

    Raises:
        UsageError: both options, or a key that no header can carry, or a file that others may read.
    """
    if key_file is not None and option is not None:
        raise UsageError("--api-key-file and --api-key both give a key", fix="give the file only")
    if key_file is not None:
        return _checked(read_secret(key_file).strip(), key_file)
    if option is not None:
        log.warning("--api-key: every user of this machine can read it in the list of processes: %s", _FIX)
        return _checked(option, "--api-key")
    return _checked(environment_text, ENVIRONMENT_NAME) if environment_text else None


def _checked(text: str, where: object) -> str:
    if not text or not text.isascii() or not text.isprintable() or text != text.strip():
        raise UsageError(
            "not an API key",
            expected="one or more printable ASCII characters, without space around them",
            found=f"{len(text)} characters",
            where=where,
        )
    return text
