"""What a person at exo can do about an error of our runtime, which itself speaks of `exo-kimi stage` and `exo-kimi serve`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from exo_kimi.errors import (
    ExoKimiError,
    KeyMismatchError,
    StageOutOfMemoryError,
    StageStalledError,
    StageUnreachableError,
)

_FIXES: tuple[tuple[type[ExoKimiError], str], ...] = (
    (
        StageUnreachableError,
        "see in `exo-kimi exo status` that its node is there, and start exo on it by `exo-kimi exo run`",
    ),
    (StageStalledError, "look at its node and at exo's log there; exo starts the runners again"),
    (
        StageOutOfMemoryError,
        "plan again with a smaller --context, or more nodes: `exo-kimi exo plan`, then `exo-kimi exo apply`",
    ),
    (KeyMismatchError, "set the same EXO_KIMI_KEY on every node, or on none, before `exo-kimi exo run`"),
)


def advise(error: ExoKimiError) -> ExoKimiError:
    """The error with a remedy that exists at exo; one that names exo already stays."""
    fix = next((fix for kind, fix in _FIXES if isinstance(error, kind)), None)
    if fix is not None and "exo-kimi exo" not in (error.fix or ""):
        error.fix = fix
    return error


@contextmanager
def advising() -> Iterator[None]:
    """Have errors of the block leave with such remedies."""
    try:
        yield
    except ExoKimiError as error:
        advise(error)
        raise
