"""`exo-kimi experts pack`: one record for each expert, the very bytes, and never those of other weights."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import resolve
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.cli.app import run
from exo_kimi.errors import UsageError
from exo_kimi.experts import packed
from exo_kimi.experts.layout import LayerLayout, layouts_of
from exo_kimi.experts.packed import FOLDER, packed_layout

SMALL = {
    "num_hidden_layers": 3,
    "hidden_size": 192,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
}
KILLED = """
import os, signal, sys
from pathlib import Path
from exo_kimi.experts import packed
left = int(sys.argv[2])
def counted(real):
    def call(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    return call
packed._read, os.fsync = counted(packed._read), counted(os.fsync)
Path.replace, Path.write_text = counted(Path.replace), counted(Path.write_text)
packed.pack_directory(Path(sys.argv[1]), say=print)
"""
LAYOUTS: dict[str, dict[str, Any]] = {"mlx": {}, "int4": {"layout": "int4", "shards": 3}, "fp8": {"layout": "fp8"}}


def bytes_of(directory: Path, layout: LayerLayout, expert: int) -> list[bytes]:
    found = []
    for part in layout.expert_bytes(expert):
        with (directory / part.entry.file).open("rb") as file:
            file.seek(part.start)
            found.append(file.read(part.nbytes))
    return found


def layouts(directory: Path) -> dict[int, LayerLayout]:
    return layouts_of(resolve(open_index(directory)).sources, floats="F32")


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
def test_a_record_has_the_bytes_of_its_expert_and_begins_at_a_page(tmp_path: Path, options: dict[str, Any]) -> None:
    directory = make_tiny(tmp_path / "tiny", config=SMALL, **options)
    run(["experts", "pack", str(directory)])
    for layout in layouts(directory).values():
        moved = packed_layout(layout, directory)
        assert (moved.disk_bytes, moved.slot_bytes) == (layout.disk_bytes, layout.slot_bytes)
        for expert in range(layout.experts):
            assert bytes_of(directory, moved, expert) == bytes_of(directory, layout, expert)
            parts = moved.expert_bytes(expert)
            assert parts[0].start % packed.ALIGN_BYTES == 0 and {part.entry.file for part in parts} == {
                f"{FOLDER}/layer-{layout.layer:05}.records"
            }
            assert all(one.end == next_one.start for one, next_one in pairwise(parts))


def test_records_of_other_weights_are_not_used_and_written_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = make_tiny(tmp_path / "tiny", config=SMALL)
    layout = layouts(directory)[1]
    assert packed_layout(layout, directory) is layout and not caplog.records
    run(["experts", "pack", str(directory)])
    records = directory / FOLDER / "layer-00001.records"
    for damage in ("cut", "time", "json"):
        assert packed_layout(layout, directory) is not layout
        with caplog.at_level(logging.WARNING):
            if damage == "cut":
                os.truncate(records, records.stat().st_size - 1)
            elif damage == "time":
                (source,) = {part.entry.file for part in layout.expert_bytes(0)[:1]}
                os.utime(directory / source, (1, 1))
            else:
                (directory / FOLDER / "layer-00001.json").write_text("{")
            assert packed_layout(layout, directory) is layout
        assert "is of other weights, or damaged" in caplog.records.pop().getMessage()
        run(["experts", "pack", str(directory)])


def test_what_was_written_before_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_tiny(tmp_path / "tiny", config=SMALL)
    run(["experts", "pack", str(directory)])
    (directory / FOLDER / "layer-00002.json").unlink()
    written: list[int] = []
    real = packed._write
    monkeypatch.setattr(packed, "_write", lambda layout, *rest: (written.append(layout.layer), real(layout, *rest)))
    run(["experts", "pack", str(directory)])
    run(["experts", "pack", str(directory)])
    assert written == [2]
    assert json.loads((directory / FOLDER / "layer-00002.json").read_text())["experts"] == 8


def test_what_the_disk_does_not_give_back_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_tiny(tmp_path / "tiny", config=SMALL)
    real = packed._checksum

    def damaged(path: Path) -> str:
        with path.open("r+b") as file:
            file.seek(100_000)
            file.write(b"\xff")
        return real(path)

    with monkeypatch.context() as patch, pytest.raises(UsageError, match="does not give back what was written"):
        patch.setattr(packed, "_checksum", damaged)
        run(["experts", "pack", str(directory)])
    assert list((directory / FOLDER).iterdir()) == []
    layout = layouts(directory)[1]
    assert packed_layout(layout, directory) is layout
    run(["experts", "pack", str(directory)])
    assert packed_layout(layout, directory) is not layout


def test_records_that_the_disk_changed_are_found_and_written_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = make_tiny(tmp_path / "tiny", config=SMALL)
    run(["experts", "pack", str(directory)])
    records = directory / FOLDER / "layer-00002.records"
    whole = records.read_bytes()
    with records.open("r+b") as file:
        file.seek(1000)
        file.write(bytes([whole[1000] ^ 1]))
    run(["experts", "pack", str(directory)])
    assert records.read_bytes() != whole  # its size says nothing
    capsys.readouterr()
    run(["experts", "pack", str(directory), "--verify"])
    assert records.read_bytes() == whole
    told = capsys.readouterr()
    assert "layer 1 is as it was written" in told.err and "layer 2 is damaged, and written anew" in told.err


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    directory, other = (make_tiny(tmp_path / name, config=SMALL, layout="int4", shards=3) for name in ("a", "b"))
    run(["experts", "pack", str(other)])
    expected = {path.name: path.read_bytes() for path in (other / FOLDER).glob("*.records")}
    layout = layouts(directory)[1]
    for calls in (
        20,
        49,
        50,
        51,
        60,
    ):  # while reading, at the end of records, at their name, at their JSON, and in the next layer
        killed = subprocess.run([sys.executable, "-c", KILLED, str(directory), str(calls)], check=False)
        assert killed.returncode == -signal.SIGKILL
        moved = packed_layout(layout, directory)
        assert all(bytes_of(directory, moved, each) == bytes_of(directory, layout, each) for each in range(8))
    run(["experts", "pack", str(directory)])
    assert {path.name: path.read_bytes() for path in (directory / FOLDER).glob("*.records")} == expected
    assert not list((directory / FOLDER).glob("*.part"))


def test_without_room_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_tiny(tmp_path / "tiny", config=SMALL)
    monkeypatch.setattr(packed.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(UsageError, match="no room for the records"):
        run(["experts", "pack", str(directory)])
    assert not (directory / FOLDER).exists()
