"""How log lines look, as text for people or as JSON for machines, and how they are read back.

    2026-11-28 07:14:03,512 INFO req_5f0c... stop: 812 prompt tokens (640 cached), 96 generated, 0.004 s in the queue
    {"time": "2026-11-28T07:14:03.512Z", "level": "INFO", "logger": "exo_kimi.runtime.engine.engine", "message": "...", ...}

A stage that runs as the server's child writes `LEVEL text` lines, which the server's log has with `stage N: ` before them.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TextIO

REQUEST_ID = re.compile(r"\breq_[0-9a-f]{32}\b")
TEXT_FORMAT = "%(asctime)s %(levelname)s %(message)s"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_OF_STAGE = re.compile(rf"(stage \d+): (?:({'|'.join(LEVELS)}) )?(.*)", re.DOTALL)
_TEXT_LINE = re.compile(rf"(\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d,\d{{3}}) ({'|'.join(LEVELS)}) (.*)")


class JsonLines(logging.Formatter):
    """One JSON object a record: `time` (UTC), `level`, `logger`, `message`; `request_id`, `stage`, `traceback` if there are."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        message = record.getMessage()
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC)
            .isoformat(timespec="milliseconds")
            .replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
        }
        if (of_stage := _OF_STAGE.fullmatch(message)) is not None:
            fields["stage"], level, message = of_stage.groups()
            fields["level"] = level or record.levelname
        fields["message"] = message
        if (found := REQUEST_ID.search(message)) is not None:
            fields["request_id"] = found[0]
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def log_to(stream: TextIO | None = None, *, as_json: bool = False) -> None:
    """Have every logger of this process write lines, from INFO on.

    Args:
        stream: None is the standard error.
        as_json: see `JsonLines`.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines() if as_json else logging.Formatter(TEXT_FORMAT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.raiseExceptions = False  # a full disk under the log is no reason for a traceback a line
    for client in ("httpx", "httpx2"):  # a line a request; huggingface_hub brings the second
        logging.getLogger(client).setLevel(logging.WARNING)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """A line of a log that was read back. `time` is as it stands there; lines of other programs have none, and no level."""

    text: str
    time: str | None = None
    level: str | None = None
    message: str = ""
    request_id: str | None = None

    @classmethod
    def of(cls, text: str) -> LogLine:
        """A line as `log_to` or anything else wrote it."""
        if text.startswith("{"):
            try:
                fields = json.loads(text)
            except ValueError:
                fields = None
            if isinstance(fields, dict) and {"time", "level", "message"} <= fields.keys():
                return cls(
                    text=text,
                    time=str(fields["time"]),
                    level=str(fields["level"]),
                    message=str(fields["message"]),
                    request_id=fields.get("request_id"),
                )
        found = _TEXT_LINE.fullmatch(text)
        message = found[3] if found is not None else text
        level = found[2] if found is not None else None
        if (of_stage := _OF_STAGE.fullmatch(message)) is not None and of_stage[2] is not None:
            level = of_stage[2]
        named = REQUEST_ID.search(message)
        return cls(
            text=text,
            time=found[1] if found is not None else None,
            level=level,
            message=message,
            request_id=named[0] if named is not None else None,
        )
