"""Names of blocks of tokens: each binds all tokens before it, so that equal names mean equal prefixes.

What else a cache depends on (weights, layers, dtype) is the stage's own to bind: see `prefix_disk.cache_identity`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from exo_kimi.errors import ProtocolError
from exo_kimi.runtime.requests import PromptPicture

KEY_DIGITS = 32
SNAPSHOT_MARK = "s"
KEY_PATTERN = rf"[0-9a-f]{{{KEY_DIGITS - 1}}}[0-9a-f{SNAPSHOT_MARK}]"
_KEYS = re.compile(rf"(?:{KEY_PATTERN})*")


def mark_pictures(ids: npt.NDArray[np.int64], pictures: Iterable[PromptPicture]) -> npt.NDArray[np.int64]:
    """Put what tells pictures apart in the place of their media tokens, whose ids are the same for all pictures.

    Args:
        ids: token ids from the first of a prompt on; changed in place.
        pictures: of the prompt.

    Returns:
        `ids`, with a negative number for each media token: 63 bits of the picture's digest plus the token's place in it.
    """
    for shown in pictures:
        count = min(shown.tokens, len(ids) - shown.start)
        if count > 0:
            first = int(shown.picture.digest[:16], 16) >> 1
            # Unsigned numbers wrap; the highest bit is set in all of them.
            places = np.arange(count, dtype=np.uint64) + np.uint64(first)
            ids[shown.start : shown.start + count] = (places | np.uint64(1 << 63)).view(np.int64)
    return ids


def mark_adapter(ids: npt.NDArray[np.int64], fingerprint: str) -> npt.NDArray[np.int64]:
    """Put what tells adapters apart in the place of the first token: a prefix with one has nothing in common with one without.

    Args:
        ids: token ids from the first of a prompt on; changed in place.
        fingerprint: of the adapter's files.

    Returns:
        `ids`, with a negative number first: 63 bits of a hash of the adapter and the token.
    """
    if len(ids):
        digest = hashlib.sha256(f"{fingerprint} {int(ids[0])}".encode()).digest()
        ids[0] = int.from_bytes(digest[:8], "little", signed=True) | -(2**63)
    return ids


def block_keys(tokens: Sequence[int] | npt.NDArray[np.int64], block_tokens: int) -> tuple[str, ...]:
    """A key for each whole block of the tokens: the hash of the key before it and the block's own ids.

    Args:
        tokens: ids, as `mark_pictures` and `mark_adapter` write them.
        block_tokens: of a block.
    """
    ids = np.asarray(tokens, "<i8")
    keys, before = [], b""
    for end in range(block_tokens, len(ids) + 1, block_tokens):
        block = ids[end - block_tokens : end]
        # Four bytes an id where that is enough: the keys of older versions, whose blocks stay of use.
        packed = block.astype("<i4") if block.min() >= 0 else block
        before = hashlib.sha256(before + packed.tobytes()).digest()[: KEY_DIGITS // 2]
        keys.append(before.hex())
    return tuple(keys)


def snapshot_key(block_key: str) -> str:
    """The key of the states after a block: its own with the mark of a snapshot for its last digit."""
    return block_key[:-1] + SNAPSHOT_MARK


def is_snapshot(key: str) -> bool:
    """Whether a key is one of states."""
    return key.endswith(SNAPSHOT_MARK)


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
