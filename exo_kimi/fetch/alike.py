"""Headers of weight files that differ in the number of a layer only: one of them says what the others are.

A model with a tensor an expert has headers of 30 MB. Its files hold a layer each, so their headers are one text with another
number in it. The law: of two files of which each names one layer, with the same bytes of tensors, the second's header is the
first's with its layer's number, where that text has exactly the second's length and begins with exactly its first bytes.
A header that does not follow is read. What was derived is held against the files when they are pulled.
"""

from __future__ import annotations

import re

_LAYER = re.compile(rb"(?<=\.layers\.)\d+(?=\.)")
_ALIGNMENT = 8


def derive_header(known: bytes, *, begin: bytes, length: int) -> bytes | None:
    """The header of a file from that of another one whose tensors have as many bytes.

    Args:
        known: header of the other file.
        begin: first bytes of the header that is not known, with a tensor's name in them.
        length: bytes of it, as its file says.

    Returns:
        The header, or None where it does not follow.
    """
    ours, theirs = set(_LAYER.findall(known)), set(_LAYER.findall(begin))
    if len(ours) != 1 or len(theirs) != 1:
        return None
    text = _LAYER.sub(theirs.pop(), known).rstrip(b" ")
    if len(known) % _ALIGNMENT == 0:  # writers fill up with spaces
        text += b" " * (-len(text) % _ALIGNMENT)
    return text if len(text) == length and text.startswith(begin) else None
