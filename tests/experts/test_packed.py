"""`exo-kimi experts pack`: one record for each expert, the very bytes, and never those of other weights."""

from __future__ import annotations

import json
import logging
import os
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


def test_without_room_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_tiny(tmp_path / "tiny", config=SMALL)
    monkeypatch.setattr(packed.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(UsageError, match="no room for the records"):
        run(["experts", "pack", str(directory)])
    assert not (directory / FOLDER).exists()
