"""Blocks on disk: their owner's alone, also those of older versions; and a bad moment of the system loses none."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from exo_kimi.checkpoint.safetensors_io import StoredTensor
from exo_kimi.runtime.protocol.messages import Join
from exo_kimi.runtime.stage import prefix_disk
from exo_kimi.runtime.stage.backend import CheckpointLayers, MlxBackend
from exo_kimi.runtime.stage.prefix_disk import BlockFiles, DamagedBlockError, OpenedDisk, PrefixDisk

IDENTITY, OTHER, KEY = "0" * 32, "1" * 32, "a" * 32
BLOCK = {"latent": StoredTensor("F32", np.arange(16, dtype=np.float32))}


@pytest.fixture(autouse=True)
def open_umask() -> Iterator[None]:
    """As on a machine that hides nothing by itself."""
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def disk_at(parent: Path, told: list[tuple[str, ...]] | None = None) -> PrefixDisk:
    def changed(added: tuple[str, ...], gone: tuple[str, ...]) -> None:
        if told is not None:
            told.append(added)

    return PrefixDisk(parent, IDENTITY, block_bytes=64, disk_bytes=1_000_000, changed=changed)


def test_what_is_written_is_for_its_owner_alone(tmp_path: Path) -> None:
    disk = disk_at(tmp_path / "cache" / "prefixes")
    disk.write(KEY, BLOCK)
    disk.flush()
    disk.close()
    for path in (tmp_path / "cache").rglob("*"):
        assert mode(path) == (0o700 if path.is_dir() else 0o600), path
    assert mode(tmp_path / "cache") == 0o700
    assert [path.name for path in (tmp_path / "cache" / "prefixes" / IDENTITY).iterdir()] == [f"{KEY}.safetensors"]


def left_by_an_older_version(parent: Path) -> list[Path]:
    """Blocks of two models as every user could read them, beside files of somebody else."""
    made = []
    for identity in (IDENTITY, OTHER):
        files = BlockFiles(parent / identity, identity)
        files.prepare()
        files.write(KEY, BLOCK)
        path = parent / identity / f"{KEY}.safetensors"
        path.chmod(0o644)
        path.parent.chmod(0o755)
        made += [path, path.parent]
    return made


def test_what_older_versions_left_is_made_private_and_nothing_else_is_touched(tmp_path: Path) -> None:
    left = left_by_an_older_version(tmp_path)
    others = tmp_path / "photos"
    others.mkdir(mode=0o755)
    (others / "a.jpg").touch(0o644)
    (tmp_path / IDENTITY / "link").symlink_to(others / "a.jpg")
    disk = disk_at(tmp_path)
    assert disk.keys() == (KEY,)
    assert disk.read(KEY) is not None
    disk.close()
    assert [mode(path) for path in left] == [0o600, 0o700, 0o600, 0o700]
    assert (mode(others), mode(others / "a.jpg")) == (0o755, 0o644)


def test_also_where_blocks_are_no_longer_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    left = left_by_an_older_version(tmp_path / "exo-kimi" / "prefixes")
    backend = MlxBackend(CheckpointLayers(None))
    loaded = SimpleNamespace(disk_settings=(16, 0, None), worker=SimpleNamespace(disk=None))
    monkeypatch.setattr(backend, "_require", lambda: loaded)
    order = Join(epoch=1, next_address=None, link="zmq", block_tokens=16, prefix_disk_bytes=0, prefix_directory=None)
    assert backend.open_disk(order, lambda *_: None) == OpenedDisk()
    assert [mode(path) for path in left] == [0o600, 0o700, 0o600, 0o700]


def test_a_block_that_cannot_be_read_for_want_of_descriptors_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = disk_at(tmp_path)
    disk.write(KEY, BLOCK)
    disk.flush()
    read_bytes = Path.read_bytes

    def none_left(path: Path) -> bytes:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    monkeypatch.setattr(Path, "read_bytes", none_left)
    assert disk.read(KEY) is None
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    block = disk.read(KEY)
    assert block is not None
    assert np.array_equal(block["latent"].data, BLOCK["latent"].data)
    disk.files.delete(KEY)
    with pytest.raises(DamagedBlockError):
        disk.files.read(KEY)
    disk.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EMFILE])
def test_a_disk_that_was_full_is_written_to_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """It was never written to again, also after one moment without descriptors."""
    monkeypatch.setattr(prefix_disk, "PAUSE_S", 0.5)
    disk, write = disk_at(tmp_path), BlockFiles.write

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(BlockFiles, "write", refuse)
    disk.write(KEY, BLOCK)
    disk.flush()
    monkeypatch.setattr(BlockFiles, "write", write)
    disk.write(KEY, BLOCK)
    disk.flush()
    assert disk.keys() == (), "not at once: each try would be a line in the log"
    time.sleep(0.5)
    disk.write(KEY, BLOCK)
    disk.flush()
    assert disk.keys() == (KEY,)
    disk.close()


@pytest.mark.parametrize("error", [OSError(28, "full"), MemoryError(), RuntimeError("a bug")])
def test_whatever_writing_meets_every_block_is_answered_and_closing_is_quick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    told: list[tuple[str, ...]] = []
    disk = disk_at(tmp_path, told)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(BlockFiles, "write", fail)
    monkeypatch.setattr(prefix_disk, "CLOSE_S", 60.0)  # what it would wait for
    for number in range(5):
        disk.write(f"{number:032x}", BLOCK)
    disk.flush()
    began_s = time.monotonic()
    disk.close()
    assert time.monotonic() - began_s < 30
    assert told == [()] * 5
