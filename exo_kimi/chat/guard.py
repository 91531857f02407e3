"""Protection against control tokens in users' strings while a template handles them.

Every control token's name begins with one of a few characters (`<` and `[` in Kimi's vocabulary). In each string that a user
supplied, those characters are swapped for stand-ins before rendering, so no name can begin inside user text: not whole, not
in two parts that the template joins, not after a trim. In the rendered text, a name that is found therefore comes from the
template. The stand-ins are drawn at random for each rendering, from private-use characters that the input does not contain.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

_PRIVATE_PLANE = range(0xF0000, 0xFFFFE)


class TextGuard:
    """Stand-ins for one rendering.

    Args:
        special: control token names to ids.
        inputs: everything that will be guarded, so that the stand-ins occur nowhere in it.
    """

    def __init__(self, special: Mapping[str, int], inputs: Any) -> None:
        self._special = special
        firsts = sorted({name[0] for name in special})
        self._stand_ins = dict(zip(firsts, _unused_characters(len(firsts), inputs), strict=True))
        self._hide = str.maketrans(self._stand_ins)
        self._names = re.compile(
            "|".join(re.escape(name) for name in sorted(special, key=len, reverse=True)) or r"(?!)"
        )
        # A template may ask for ASCII-only JSON, in which the stand-in is a pair of \u escapes.
        forms = {form: first for first, char in self._stand_ins.items() for form in (char, *_escapes(char))}
        self._forms = forms
        self._shown = re.compile("|".join(map(re.escape, forms)) or r"(?!)")

    def hide(self, value: Any) -> Any:
        """A copy of a JSON value with every string and key guarded."""
        if isinstance(value, str):
            return value.translate(self._hide)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(item) for item in value]
        return value

    def show(self, text: str) -> str:
        """The text with the original characters back."""
        return self._shown.sub(lambda match: self._forms[match.group()], text)

    def split(self, rendered: str) -> Iterator[str | int]:
        """Control token ids and stretches of ordinary text, shown, in order."""
        start = 0
        for match in self._names.finditer(rendered):
            if match.start() > start:
                yield self.show(rendered[start : match.start()])
            yield self._special[match.group()]
            start = match.end()
        if start < len(rendered):
            yield self.show(rendered[start:])


def _unused_characters(count: int, inputs: Any) -> list[str]:
    used = {ord(char) for text in _strings(inputs) if not text.isascii() for char in text}
    chosen: list[str] = []
    while len(chosen) < count:
        code = _PRIVATE_PLANE[secrets.randbelow(len(_PRIVATE_PLANE))]
        if code not in used:
            used.add(code)
            chosen.append(chr(code))
    return chosen


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _escapes(char: str) -> tuple[str, str]:
    raw = char.encode("utf-16-be").hex()
    return (f"\\u{raw[:4]}\\u{raw[4:]}", f"\\u{raw[:4]}\\u{raw[4:]}".upper().replace("\\U", "\\u"))
