"""Names of blocks of tokens: each binds all tokens before it, so that equal names mean equal prefixes.

What else a cache depends on (weights, layers, dtype) is the stage's own to bind: see `prefix_disk.cache_identity`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

from exo_kimi.errors import ProtocolError

KEY_DIGITS = 32
_KEYS = re.compile(rf"(?:[0-9a-f]{{{KEY_DIGITS}}})*")


def block_keys(tokens: Sequence[int], block_tokens: int) -> tuple[str, ...]:
    """A key for each whole block of the tokens: the hash of the key before it and the block's own ids."""
    ids = np.asarray(tokens, "<i4")
    keys, before = [], b""
    for end in range(block_tokens, len(ids) + 1, block_tokens):
        before = hashlib.sha256(before + ids[end - block_tokens : end].tobytes()).digest()[: KEY_DIGITS // 2]
        keys.append(before.hex())
    return tuple(keys)


def is_key(text: object) -> bool:
    """Whether a value is one key; it is safe as a file's name then."""
    return isinstance(text, str) and len(text) == KEY_DIGITS and _KEYS.fullmatch(text) is not None


def pack_keys(keys: Iterable[str]) -> str:
    """Keys in one string, end to end."""
    return "".join(keys)


def unpack_keys(text: str) -> tuple[str, ...]:
    """The keys of `pack_keys`.

    Raises:
        ProtocolError: these are no keys.
    """
    if _KEYS.fullmatch(text) is None:
        raise ProtocolError("block keys", expected=f"{KEY_DIGITS} hexadecimal digits each", found=repr(text)[:80])
    return tuple(text[start : start + KEY_DIGITS] for start in range(0, len(text), KEY_DIGITS))
