"""A whole server whose checkpoint lies on a file system that fails: its reads are the kernel's own. Linux, root."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.experts.layout import layouts_of
from exo_kimi.experts.traces.trace import read_trace
from tests.faults.faulty_fs import Control, mounted, unmount
from tests.faults.streaming_server import ANSWER_S, StreamingServer

SCRIPT = Path(__file__).with_name("faulty_fs.py")
MANY_EXPERTS = {"n_routed_experts": 64, "num_experts_per_tok": 2, "num_hidden_layers": 4}
"""So many that two texts do not ask for the same ones."""

STALL_S = 2
TEXTS = ("one", "zwei Worte", "quatre 4 !")


def can_mount() -> bool:
    """Whether this user may mount a file system of its own."""
    probe = Path(__file__).parent
    if sys.platform != "linux" or not Path("/dev/fuse").exists():
        return False
    try:
        device = mounted(probe)
    except OSError:
        return False
    unmount(probe)
    return device >= 0


def is_in_the_kernel(pid: int) -> bool:
    """Whether one of a process's threads waits where no signal reaches it."""
    states = [path.read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return "D" in states


class FaultyDisk:
    """A checkpoint behind the faulty file system."""

    def __init__(self, folder: Path) -> None:
        self.source = make_tiny(folder / "source", layout="int4", shards=1, config=MANY_EXPERTS)
        self.path, control = folder / "mount", folder / "control"
        self.path.mkdir()
        control.write_bytes(bytes(ctypes.sizeof(Control)))
        self._file = control.open("r+b")
        self.control = Control.from_buffer(mmap.mmap(self._file.fileno(), ctypes.sizeof(Control)))
        words = [sys.executable, str(SCRIPT), *map(str, (self.source, self.path, control))]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None and self.process.stdout.readline() == "mounted\n"
        self.trace = folder / "asked.trace"
        self._seen: dict[Path, int] = {}

    def asked(self) -> set[tuple[int, int]]:
        """Experts that the server asked for since this was called last, each with its layer, in a slot or not."""
        time.sleep(0.3)  # they are written down after a pass, which may be after the answer
        found = set()
        for path in sorted(self.trace.parent.glob(f"{self.trace.stem}*")):
            trace = read_trace(path)
            for layer, ids in zip(trace.layers, trace.ids, strict=True):
                found |= {(layer, expert) for expert in ids[self._seen.get(path, 0) :].ravel().tolist()}
            self._seen[path] = trace.tokens
        return found

    def end(self) -> None:
        self.control.hanging = 0
        self.process.kill()
        self.process.wait()
        unmount(self.path)
        self._file.close()


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyDisk]:
    if not can_mount():
        pytest.skip("cannot mount a file system here")
    one = FaultyDisk(tmp_path_factory.mktemp("fuse"))
    yield one
    one.end()


@pytest.fixture(scope="module")
def server(disk: FaultyDisk, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StreamingServer]:
    options = ("--expert-prefetch", "off", "--survive", "1s", "--stall-deadline", f"{STALL_S}s")
    options += ("--trace-experts", str(disk.trace))
    one = StreamingServer(disk.path, tmp_path_factory.mktemp("server"), slots=2, options=options)
    yield one
    disk.control.hanging = 0
    one.end()


def test_a_bad_sector_ends_the_request_that_needs_it_and_no_other(server: StreamingServer, disk: FaultyDisk) -> None:
    victim, two, three = TEXTS
    expected, wanted = {}, dict[str, list[set[tuple[int, int]]]]()
    for text in (victim, two, three, victim, three, two):
        expected[text] = server.ask(text)
        wanted.setdefault(text, []).append(disk.asked())
    assert all(status == 200 for status, _ in expected.values())
    others = [each for text in (two, three) for each in wanted[text]]
    layer, expert = min(set.intersection(*wanted[victim]).difference(*others))
    first, *_ = layouts_of(Checkpoint(disk.source).manifest().sources)[layer].expert_bytes(expert)
    disk.control.bad_start, disk.control.bad_end = first.start, first.start + 1
    results: dict[str, tuple[int, str]] = {}
    threads = [
        threading.Thread(target=lambda text=text: results.update({text: server.ask(text)}))  # type: ignore[misc]
        for text in TEXTS
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    status, message = results.pop(victim)
    assert status == 503 and f"cannot read {first.entry.name}" in message and "Input/output error" in message
    assert results == {text: expected[text] for text in (two, three)}
    disk.control.bad_end = 0
    assert server.ask(victim) == expected[victim]
    assert server.restarts() == 0, server.log.read_text()


def test_reads_that_give_less_than_was_asked_for_go_on(server: StreamingServer, disk: FaultyDisk) -> None:
    expected = server.ask("short reads")
    disk.control.short_bytes = 1000
    before = disk.control.reads
    server.ask("other words")
    assert server.ask("short reads") == expected
    disk.control.short_bytes = 0
    assert disk.control.reads > before


def test_a_disk_that_answers_no_more_is_told_and_a_server_is_right_again_once_it_does(
    server: StreamingServer, disk: FaultyDisk
) -> None:
    """A stage whose read hangs inside the kernel cannot even be killed: it ends when the disk answers."""
    expected = server.ask("a disk that hangs")
    pids = [stage["pid"] for stage in server.health()["stages"]]
    disk.control.hanging = 1
    results: list[tuple[int, str]] = []
    asking = threading.Thread(target=lambda: results.append(server.ask("words that need other experts")))
    asking.start()
    asking.join(ANSWER_S)
    assert not asking.is_alive() and disk.control.waiting > 0
    ((status, message),) = results
    assert status == 503 and "stage" in message, message
    assert any(is_in_the_kernel(pid) for pid in pids)
    assert server.health()["status"] != "ok"  # and it answers at once
    disk.control.hanging = 0
    server.wait_up()
    assert server.ask("a disk that hangs") == expected
