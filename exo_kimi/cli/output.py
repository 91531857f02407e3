"""What commands share: files that they write where the user asked for it, and a machine that stays awake meanwhile."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from exo_kimi.errors import UsageError


def write_text(path: Path, text: str, *, option: str) -> None:
    """Write a file and say so.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError("cannot write the file", found=error.strerror, where=f"{option} {path}") from None
    print(f"wrote {path}", file=sys.stderr)


def awake() -> AbstractContextManager[None]:
    """Keep the machine awake while a command serves, unless its service does."""
    from exo_kimi.owner.awake import KEPT_ENVIRONMENT_NAME, awake_while_serving

    kept = KEPT_ENVIRONMENT_NAME in os.environ
    return awake_while_serving(os.getpid(), already_kept=kept, say=partial(print, file=sys.stderr, flush=True))
