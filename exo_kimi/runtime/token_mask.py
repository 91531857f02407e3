"""Masks of allowed tokens, as `TokenConstraint.mask` packs them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def allowed(mask: bytes, vocab_size: int) -> npt.NDArray[np.bool_]:
    """A mask as bool [vocab_size]; tokens beyond its end are not allowed."""
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")[:vocab_size]
    return np.pad(bits, (0, vocab_size - len(bits))).astype(np.bool_)
