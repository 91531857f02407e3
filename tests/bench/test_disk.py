"""The speed of a disk: a number, past the cache, and no file left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from exo_kimi.bench.setups import disk
from exo_kimi.bench.setups.disk import LEAST_RECORDS, read_speed

SMALL = {"file_bytes": 16 << 20, "record_bytes": 1 << 20}


def test_a_speed_is_measured_and_nothing_is_left(tmp_path: Path) -> None:
    speed = read_speed(tmp_path, **SMALL)
    assert speed is None or 1e6 < speed < 1e12
    assert list(tmp_path.iterdir()) == []


def test_every_record_is_read_once_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    real = disk._read

    def counted(descriptor: int, share: list[int], record_bytes: int) -> int:
        read.extend(share)
        return real(descriptor, share, record_bytes)

    monkeypatch.setattr(disk, "_read", counted)
    monkeypatch.setattr(disk, "_past_the_cache", lambda path: disk.os.open(path, disk.os.O_RDONLY))
    assert read_speed(tmp_path, **SMALL)
    assert sorted(read) == list(range(16)) != read


def test_a_full_disk_and_one_in_memory_are_not_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_past_the_cache", lambda path: None)
    assert read_speed(tmp_path, **SMALL) is None
    usage = type("Usage", (), {"free": 2 * (LEAST_RECORDS - 1) << 20})
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage)
    assert read_speed(tmp_path, **SMALL) is None
    assert list(tmp_path.iterdir()) == []
