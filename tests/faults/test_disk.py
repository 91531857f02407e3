"""A whole server with experts on disk, while the disk fails, is slow, and loses its files: errors by name, nothing hangs."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from exo_kimi.checkpoint.tiny.make import make_tiny
from tests.faults.streaming_server import STALL_S, StreamingServer

SLOTS = 5
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a compiler"
)


class Control(ctypes.Structure):
    """See disk.c."""

    _fields_ = (("failing", ctypes.c_long), ("delay_us", ctypes.c_long), ("calls", ctypes.c_long))


class DiskServer(StreamingServer):
    """One whose reads go through disk.c."""

    def __init__(self, folder: Path) -> None:
        self.model = make_tiny(folder / "tiny", layout="int4", shards=2)
        library, control = folder / "disk.so", folder / "control"
        source = Path(__file__).with_name("disk.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
        control.write_bytes(bytes(ctypes.sizeof(Control)))
        self._file = control.open("r+b")
        self.disk = Control.from_buffer(mmap.mmap(self._file.fileno(), ctypes.sizeof(Control)))
        environment = {"LD_PRELOAD": str(library), "EXO_KIMI_DISK": str(control)}
        super().__init__(self.model, folder, slots=SLOTS, environment=environment)

    def end(self) -> None:
        super().end()
        self._file.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiskServer]:
    one = DiskServer(tmp_path_factory.mktemp("disk"))
    yield one
    one.end()


def test_experts_are_read_from_the_disk_that_fails_in_these_tests(server: DiskServer) -> None:
    assert server.ask("hello")[0] == 200
    before = server.disk.calls
    server.ask("another question")
    assert server.disk.calls > before


def test_an_input_output_error_ends_its_request_by_name_and_others_go_on(server: DiskServer) -> None:
    expected = {text: server.ask(text) for text in ("one", "two words", "and three words")}
    results: dict[str, tuple[int, str]] = {}
    askers = [
        threading.Thread(target=lambda text=text: results.update({text: server.ask(text)}))  # type: ignore[misc]
        for text in expected
    ]
    server.disk.failing = 1
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert server.disk.failing <= 0
    failed = [text for text, (status, _) in results.items() if status != 200]
    assert len(failed) <= 1, "one read failed"
    for text in failed:
        assert results[text][0] == 503 and "cannot read" in results[text][1] and "mlp.experts." in results[text][1]
    assert all(results[text] == expected[text] for text in results if text not in failed)
    assert {text: server.ask(text) for text in expected} == expected


def test_a_disk_that_stays_broken_answers_every_request_and_heals(server: DiskServer) -> None:
    expected = server.ask("a broken disk")
    server.disk.failing = 10**9
    status, message = server.ask("something new for a broken disk")
    assert status == 503 and "cannot read" in message and "Input/output error" in message
    server.disk.failing = 0
    assert server.ask("a broken disk") == expected
    assert server.restarts() == 0, server.log.read_text()


def test_reads_slower_than_the_stall_deadline_are_waited_for(server: DiskServer) -> None:
    """Reading that goes on is no stall, however long a pass takes."""
    expected = server.ask("patience", max_tokens=2)
    server.disk.delay_us = 40_000
    calls, start_s = server.disk.calls, time.monotonic()
    try:
        assert server.ask("patience", max_tokens=2) == expected
    finally:
        server.disk.delay_us = 0
    assert server.disk.calls > calls and time.monotonic() - start_s > STALL_S
    assert server.restarts() == 0, server.log.read_text()


def test_a_file_that_is_cut_is_an_error_by_name_and_right_when_it_is_whole_again(server: DiskServer) -> None:
    expected = server.ask("a file that is cut")
    files = {path: path.read_bytes() for path in server.model.glob("*.safetensors")}
    for path, content in files.items():
        os.truncate(path, len(content) // 50)
    status, message = server.ask("words for which other experts are read")
    assert status == 503 and "cannot read" in message and "the file ends" in message and ".safetensors" in message
    for path, content in files.items():
        path.write_bytes(content)  # into the same file
    assert server.ask("a file that is cut") == expected
    assert server.restarts() == 0, server.log.read_text()


def test_files_that_are_removed_are_still_read(server: DiskServer) -> None:
    expected = server.ask("removed files")
    for path in server.model.glob("*.safetensors"):
        path.unlink()
    calls = server.disk.calls
    server.ask("other words need other experts")
    assert server.ask("removed files") == expected
    assert server.disk.calls > calls
    assert server.health()["status"] == "ok" and server.restarts() == 0
