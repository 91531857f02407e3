"""Log lines: as JSON they are one object each, with the request and the stage; as either they are read back alike."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from exo_kimi.logs import JsonLines, LogLine

ID = "req_" + "0123456789abcdef" * 2


@pytest.fixture
def record() -> Iterator[logging.Logger]:
    logger = logging.getLogger("exo_kimi.tests.logs")
    logger.propagate, logger.level = False, logging.INFO
    yield logger
    logger.handlers.clear()


def lines_of(logger: logging.Logger) -> io.StringIO:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    logger.addHandler(handler)
    return stream


def test_a_json_line_names_request_and_stage(record: logging.Logger) -> None:
    stream = lines_of(record)
    record.info("%s-1 stop: %d prompt tokens", ID, 3)
    record.info("stage 1: WARNING a step failed\nover two lines, of %s", ID)
    record.info("stage 0: no level here")
    try:
        raise ValueError("a bug")
    except ValueError:
        record.exception("it failed")
    first, second, third, fourth = map(json.loads, stream.getvalue().splitlines())
    assert (first["request_id"], first["level"], first["message"]) == (ID, "INFO", f"{ID}-1 stop: 3 prompt tokens")
    assert (second["stage"], second["level"], second["request_id"]) == ("stage 1", "WARNING", ID)
    assert (third["stage"], third["level"], third["message"]) == ("stage 0", "INFO", "no level here")
    assert "ValueError: a bug" in fourth["traceback"]
    assert first["time"].endswith("Z")


@pytest.mark.parametrize("as_json", [False, True])
def test_what_is_written_is_read_back(as_json: bool) -> None:
    code = "import logging; from exo_kimi.logs import log_to; log_to(as_json=%r); logging.getLogger('x').warning(%r)"
    text = f"stage 1: ERROR {ID} is gone"
    done = subprocess.run(
        [sys.executable, "-c", code % (as_json, text)], capture_output=True, text=True, check=True, timeout=60
    )
    line = LogLine.of(done.stderr.rstrip("\n"))
    assert (line.level, line.request_id) == ("ERROR", ID)
    assert line.time is not None
    assert line.message in (text, f"{ID} is gone")


@pytest.mark.parametrize("text", ["", "{", "{}", "[1]", '{"time": 1}', "serving at http://127.0.0.1:1", "Traceback"])
def test_lines_of_others_are_lines_without_a_level(text: str) -> None:
    assert LogLine.of(text) == LogLine(text=text, message=text)
