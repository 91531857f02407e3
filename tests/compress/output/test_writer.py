"""The writer of output directories: its bytes, what it refuses, and what a kill or a full disk leaves."""

from __future__ import annotations

import errno
import json
import os
from concurrent.futures import wait
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from exo_kimi.checkpoint.safetensors_io import read_header
from exo_kimi.compress.output import journal, shard_file, writer
from exo_kimi.compress.output.job import JOURNAL_NAME, MANIFEST_NAME, OutputJob
from exo_kimi.compress.output.shard_file import ShardFile
from exo_kimi.compress.output.shards import OutputShard, OutputTensor, cut_shards, index_text
from exo_kimi.compress.output.writer import CheckpointWriter, Written
from exo_kimi.errors import MachineError, TensorFileError, UsageError

GROUPS = [
    [OutputTensor(f"layer.{n}.scales", "BF16", (4, 3)), OutputTensor(f"layer.{n}.weight", "U32", (4, 8))]
    for n in range(6)
]


def job(directory: Path, *, meaning: dict[str, object] | None = None, shard_bytes: int = 400) -> OutputJob:
    shards = cut_shards(GROUPS, shard_bytes=shard_bytes)
    texts = {"config.json": "{}\n", "model.safetensors.index.json": index_text(shards)}
    return OutputJob(
        directory=directory, kind="convert", meaning=meaning or {"source": "a"}, shards=shards, texts=texts
    )


def content(tensor: OutputTensor) -> bytes:
    return np.random.default_rng(len(tensor.name) + ord(tensor.name[6])).bytes(tensor.nbytes)


def run(job: OutputJob, *, shards: int | None = None) -> Written:
    with CheckpointWriter(job) as out:
        for count, shard in enumerate(out.missing()):
            if count == shards:
                raise InterruptedError
            with out.open(shard) as file:
                for tensor in reversed(shard.tensors):
                    half = tensor.nbytes // 2
                    file.put(tensor.name, content(tensor)[half:], at=half)
                    file.put(tensor.name, content(tensor)[:half])
        return out.finish()


def everything(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_files_hold_what_was_put_and_the_index_says_where(tmp_path: Path) -> None:
    run(job(tmp_path / "out"))
    weight_map = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = [tensor for group in GROUPS for tensor in group]
    assert set(weight_map) == {tensor.name for tensor in tensors}
    assert len(set(weight_map.values())) == 3
    for file in set(weight_map.values()):
        _, entries, problems = read_header(tmp_path / "out" / file)
        assert not problems
        raw = (tmp_path / "out" / file).read_bytes()
        for entry in entries:
            wanted = next(tensor for tensor in tensors if tensor.name == entry.name)
            assert raw[entry.start : entry.end] == content(wanted)
            assert entry.start % 4 == 0 or entry.dtype != "U32"
        with safe_open(tmp_path / "out" / file, "np") as opened:  # the library's own strict reader
            assert set(opened.keys()) == {entry.name for entry in entries}


def test_the_manifest_has_the_hash_of_every_file_and_no_path_or_time(tmp_path: Path) -> None:
    import hashlib

    for name in "ab":
        run(job(tmp_path / name))
    assert everything(tmp_path / "a") == everything(tmp_path / "b")
    files = json.loads((tmp_path / "a" / MANIFEST_NAME).read_text())["files"]
    others = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir() if path.name != MANIFEST_NAME}
    assert {name: hashlib.sha256(data).hexdigest() for name, data in others.items()} == {
        name: stated["sha256"] for name, stated in files.items()
    }


@pytest.mark.parametrize("shards", [0, 1, 2, 3])
def test_an_interrupted_run_is_continued_and_ends_the_same(tmp_path: Path, shards: int) -> None:
    run(job(tmp_path / "whole"))
    try:
        run(job(tmp_path / "cut"), shards=shards)
    except InterruptedError:
        assert not (tmp_path / "cut" / "config.json").exists()
        assert (tmp_path / "cut" / JOURNAL_NAME).exists()
    again = run(job(tmp_path / "cut"))
    assert again.kept >= min(shards, 3) - 1
    assert everything(tmp_path / "cut") == everything(tmp_path / "whole")


def test_a_second_run_touches_nothing(tmp_path: Path) -> None:
    run(job(tmp_path))
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert run(job(tmp_path)).unchanged
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_run_that_was_killed_with_all_done_but_its_journal_ends_the_same(tmp_path: Path) -> None:
    run(job(tmp_path))
    before = everything(tmp_path)
    (tmp_path / JOURNAL_NAME).write_bytes(before[MANIFEST_NAME])
    assert run(job(tmp_path)).unchanged
    assert everything(tmp_path) == before


def test_a_lost_file_of_a_finished_output_is_written_again(tmp_path: Path) -> None:
    run(job(tmp_path))
    before = everything(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    assert run(job(tmp_path)).kept == 2
    assert everything(tmp_path) == before


def test_another_job_and_another_directory_are_refused(tmp_path: Path) -> None:
    run(job(tmp_path / "out"))
    with pytest.raises(UsageError, match=r"of another run") as refused:
        run(job(tmp_path / "out", meaning={"source": "b"}))
    assert '"b"' in str(refused.value.expected) and '"a"' in str(refused.value.found)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    with pytest.raises(UsageError, match="not empty"):
        run(job(tmp_path / "mine"))


def test_one_process_at_a_time_writes_a_directory(tmp_path: Path) -> None:
    with CheckpointWriter(job(tmp_path)), pytest.raises(UsageError, match="another process"):
        CheckpointWriter(job(tmp_path))
    run(job(tmp_path))


def test_bytes_that_nobody_wrote_are_an_error_not_zeros(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nobody wrote"), CheckpointWriter(job(tmp_path)) as out:
        for shard in out.missing():
            with out.open(shard) as file:
                for tensor in shard.tensors[1:]:
                    file.put(tensor.name, content(tensor))
    with CheckpointWriter(job(tmp_path)) as out, pytest.raises(ValueError, match="written twice"):
        for shard in out.missing():
            with out.open(shard) as file:
                for _ in range(2):
                    file.put(shard.tensors[0].name, content(shard.tensors[0]))
    with CheckpointWriter(job(tmp_path)) as out, pytest.raises(ValueError, match="bytes 0 to 999"):
        for shard in out.missing():
            with out.open(shard) as file:
                file.put(shard.tensors[0].name, bytes(999))


def test_a_disk_that_gives_back_other_bytes_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def damage(descriptor: int) -> None:
        real(descriptor)
        size = os.fstat(descriptor).st_size
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == "model-00002-of-00003.safetensors.part":
            os.pwrite(descriptor, b"\x5a", size - 7)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc")
    monkeypatch.setattr(writer.os, "fsync", damage)
    with pytest.raises(TensorFileError, match="other bytes"):
        run(job(tmp_path))
    monkeypatch.setattr(writer.os, "fsync", real)
    assert not (tmp_path / "model-00002-of-00003.safetensors").exists()
    run(job(tmp_path))


def test_what_has_no_gap_before_it_is_verified_behind_the_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of the only shard; and damage there is found, whenever it was read again."""
    run(job(tmp_path / "whole", shard_bytes=10_000))
    monkeypatch.setattr(shard_file, "STEP_BYTES", 300)
    real, behind = ShardFile._verify, []

    def verify(file: ShardFile, end: int) -> None:
        real(file, end)
        behind.append(end)

    def write(directory: Path) -> None:
        with CheckpointWriter(job(directory, shard_bytes=10_000)) as out:
            for shard in out.missing():
                with out.open(shard) as file:
                    for tensor in shard.tensors:
                        file.put(tensor.name, content(tensor))
                    wait(file._verifying, timeout=60)
            out.finish()

    monkeypatch.setattr(ShardFile, "_verify", verify)
    write(tmp_path / "out")
    assert len(behind) > 3 and behind == sorted(behind)
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")

    def damage(file: ShardFile, end: int) -> None:
        os.pwrite(file._descriptor, b"\x5a", end - 7)
        real(file, end)

    monkeypatch.setattr(ShardFile, "_verify", damage)
    with pytest.raises(TensorFileError, match="other bytes"):
        write(tmp_path / "damaged")
    assert not list((tmp_path / "damaged").glob("*.safetensors"))


def test_a_full_disk_stops_it_and_room_lets_it_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, written = os.pwrite, 0

    def full(descriptor: int, data: memoryview, position: int) -> int:
        nonlocal written
        written += len(data)
        if written > 1500:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, position)

    monkeypatch.setattr(writer.os, "pwrite", full)
    with pytest.raises(MachineError, match="the disk is full") as stopped:
        run(job(tmp_path / "out"))
    assert "goes on" in str(stopped.value)
    assert not list((tmp_path / "out").glob("*.safetensors.part"))
    monkeypatch.setattr(writer.os, "pwrite", real)
    run(job(tmp_path / "whole"))
    assert run(job(tmp_path / "out")).kept >= 1
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def test_no_room_is_said_before_a_byte_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 100

    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(MachineError, match="no room"):
        run(job(tmp_path))
    assert not list(tmp_path.glob("model*"))


def test_headers_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    from safetensors.numpy import save

    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "é a": np.zeros((0, 5), np.float32)}
    saved = save(arrays, {"format": "pt"})
    tensors = tuple(OutputTensor(name, "F32", arrays[name].shape) for name in arrays)
    assert saved.startswith(OutputShard("x", tensors, {"format": "pt"}).header)


def test_a_directory_without_its_journal_is_nobodys(tmp_path: Path) -> None:
    run(job(tmp_path))
    (tmp_path / MANIFEST_NAME).write_text('{"job": 3}', encoding="utf-8")
    with pytest.raises(UsageError, match="cannot be read"):
        run(job(tmp_path))
    assert journal.PART == ".part"
