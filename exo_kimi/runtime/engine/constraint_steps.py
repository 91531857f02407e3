"""Stepping a request's grammar, which is foreign code: whatever it raises must fail that request and no other."""

from __future__ import annotations

import logging

from exo_kimi.errors import ExoKimiError, StageError
from exo_kimi.runtime.requests import TokenConstraint
from exo_kimi.runtime.token_mask import allowed

logger = logging.getLogger(__name__)


def next_mask(constraint: TokenConstraint, *, accept: int | None, vocab_size: int | None) -> bytes | None:
    """Advance a grammar by a token, if there is one, and ask what may follow.

    Args:
        constraint: the request's own.
        accept: the token that was just sampled; None before the first.
        vocab_size: rows of the model's head; None while it is not known.

    Returns:
        A mask that allows at least one token, or None when all are allowed.

    Raises:
        StageError: it raised, or it allows nothing.
    """
    try:
        if accept is not None:
            constraint.accept(accept)
        mask = constraint.mask()
    except ExoKimiError:
        raise
    except Exception as error:
        logger.exception("a request's grammar failed")
        raise StageError(f"the request's grammar failed: {type(error).__name__}: {error}") from error
    if mask is not None and not allowed(mask, len(mask) * 8 if vocab_size is None else vocab_size).any():
        raise StageError("the request's grammar allows no token")
    return mask
