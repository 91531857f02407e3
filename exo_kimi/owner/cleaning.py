"""What may leave this machine in a report: no key, no path of a home, no text of a conversation.

Of a log, only lines that exo-kimi wrote are kept, and of a traceback the places and the class of the error. Within them, what
stands in quotation marks and may be somebody's words gives way to its length.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from exo_kimi.logs import LogLine

SHORTEST_SECRET = 4
QUOTED_CHARACTERS = 24
MESSAGE_CHARACTERS = 500
_QUOTED = re.compile(r"'((?:[^'\\\n]|\\.)*)'|\"((?:[^\"\\\n]|\\.)*)\"")
_KEYS = re.compile(
    r"(?i)(?<![a-z0-9])((?:bearer|x-api-key:?|authorization:?)\s+\S+|(?:sk|hf|ghp|xoxb)[-_][A-Za-z0-9_-]{8,}"
    r"|EXO_KIMI_(?:API_)?KEY=\S+|[a-z0-9_]*(?:token|secret|password)=\S+)"
)
_HOMES = re.compile(r"/(?:Users|home)/[^/\s'\":,]+")
_PLACE = re.compile(r'  File "[^"\n]+", line \d+, in \S+')
_RAISED = re.compile(r"((?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception|Fault|Interrupt|Exit))(?::.*)?")


class Cleaner:
    """Takes out what is known to be secret here, and what looks as if.

    Args:
        secrets: texts of keys.
        home: of this user.
    """

    def __init__(self, secrets: Iterable[str], home: Path) -> None:
        found = {secret.strip() for secret in secrets}
        self._secrets = sorted((each for each in found if len(each) >= SHORTEST_SECRET), key=len, reverse=True)
        self._home = str(home)

    def text(self, text: str) -> str:
        """A text of ours, such as a plan or a status: without keys and homes."""
        for secret in self._secrets:
            text = text.replace(secret, "<key>")
        text = _KEYS.sub("<key>", text)
        if len(self._home) > 1:
            text = text.replace(self._home, "~")
        return _HOMES.sub("~", text)

    def message(self, text: str) -> str:
        """A message of a log: without what somebody may have said, too."""
        return self.text(_QUOTED.sub(_without_words, text))[:MESSAGE_CHARACTERS]

    def values(self, found: Any) -> Any:
        """JSON whose texts are messages."""
        if isinstance(found, str):
            return self.message(found)
        if isinstance(found, list):
            return [self.values(each) for each in found]
        if isinstance(found, dict):
            return {self.text(str(key)): self.values(value) for key, value in found.items()}
        return found

    def log(self, lines: Sequence[str]) -> list[str]:
        """The lines of a log that are ours, clean; a line says how many were not."""
        kept: list[str] = []
        left_out = 0
        for line in lines:
            clean = self._line(line)
            if clean is None:
                left_out += 1
            else:
                kept.append(clean)
        return [*kept, *([f"[{left_out} lines that are not exo-kimi's were left out]"] if left_out else [])]

    def _line(self, text: str) -> str | None:
        line = LogLine.of(text)
        if line.time is not None and line.level is not None:
            return f"{line.time} {line.level} {self.message(line.message)}"
        if text == "Traceback (most recent call last):":
            return text
        if (place := _PLACE.fullmatch(text)) is not None:
            return self.text(place[0])
        raised = _RAISED.fullmatch(text)
        return raised[1] if raised is not None else None


def _without_words(quoted: re.Match[str]) -> str:
    inner = quoted[1] if quoted[1] is not None else quoted[2]
    words = len(inner) > QUOTED_CHARACTERS or " " in inner
    return f"'<{len(inner)} characters>'" if words else quoted[0]
