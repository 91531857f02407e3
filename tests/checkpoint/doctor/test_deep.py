"""--deep: every value that cannot be is found, in every format, with bounded memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from exo_kimi.checkpoint.doctor import deep
from exo_kimi.checkpoint.doctor.doctor import doctor
from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.safetensors_io import TensorEntry
from exo_kimi.errors import NotFiniteError, ShapeMismatchError

NAN = {"BF16": b"\xc0\x7f", "F16": b"\x01\x7e", "F32": b"\x00\x00\xc0\xff", "F8_E4M3": b"\xff"}
INFINITY = {"BF16": b"\x80\xff", "F16": b"\x00\x7c", "F32": b"\x00\x00\x80\x7f"}
LARGEST = {"BF16": b"\x7f\x7f", "F16": b"\xff\x7b", "F32": b"\xff\xff\x7f\xff", "F8_E4M3": b"\xfe"}


def poke(directory: Path, entry: TensorEntry, offset: int, data: bytes) -> None:
    with (directory / entry.file).open("r+b") as stream:
        stream.seek(entry.start + offset)
        stream.write(data)


def kinds(directory: Path) -> dict[tuple[str, str], TensorEntry]:
    """One tensor of each last name and dtype."""
    return {(name.rpartition(".")[2], e.dtype): e for name, e in open_index(directory).tensors.items()}


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "F16"}, {"dtype": "F32"}, {"layout": "int4"}, {"layout": "fp8"}, {"layout": "bf16", "absorbed": True}],
    ids=str,
)  # fmt: skip
def test_nan_and_infinity_are_found_in_every_kind_of_tensor(make, options: dict[str, object]) -> None:
    directory = make(**options)
    tried = 0
    for entry in kinds(directory).values():
        if entry.dtype not in NAN:
            continue
        width = len(NAN[entry.dtype])
        last = entry.nbytes - width
        original = (directory / entry.file).read_bytes()[entry.start + last : entry.end]
        for values, word in ((NAN, "1 NaN"), (INFINITY, "1 infinite"), (LARGEST, "")):
            if entry.dtype not in values:
                continue
            poke(directory, entry, last, values[entry.dtype])
            assert doctor(directory).findings == ()
            errors = [finding.error for finding in doctor(directory, deep=True).findings]
            if word:
                (error,) = errors
                assert isinstance(error, NotFiniteError)
                assert error.what == f"{entry.name} is not finite"
                place = tuple(size - 1 for size in entry.shape)
                assert error.found == f"{word}, the first at {place}"
            else:
                assert errors == []
            tried += 1
        poke(directory, entry, last, original)
    assert tried >= 6


def test_an_int4_shape_that_is_not_the_packings_is_found(make) -> None:
    directory = make(layout="int4")
    entry = open_index(directory).tensors["model.layers.1.mlp.experts.2.down_proj.weight_shape"]
    poke(directory, entry, 0, np.array([128, 65], "<i4").tobytes())
    (finding,) = doctor(directory, deep=True).findings
    assert isinstance(finding.error, ShapeMismatchError)
    assert finding.error.what.startswith(entry.name)
    assert (finding.error.expected, finding.error.found) == ("(128, 64), as weight_packed has it", "(128, 65)")


def test_memory_does_not_grow_with_a_tensor(make, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make(layout="bf16", config={"vocab_size": 16384})
    monkeypatch.setattr(deep, "PIECE_BYTES", 2**16)
    assert max(entry.nbytes for entry in open_index(directory).tensors.values()) == 4 * 2**20
    doctor(directory, deep=True)
    tracemalloc.start()
    try:
        doctor(directory, deep=True)
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        entry = open_index(directory).tensors["lm_head.weight"]
        pieces = sum(len(piece) for piece in deep._pieces(directory, entry))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert pieces == entry.nbytes
    assert peak - before < 3 * 2**20


def test_progress_ends_at_the_bytes_of_all_tensors(make) -> None:
    directory = make()
    seen: list[tuple[int, int]] = []
    doctor(directory, deep=True, progress=lambda done, total: seen.append((done, total)))
    whole = sum(entry.nbytes for entry in open_index(directory).tensors.values())
    assert seen[-1] == (whole, whole)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_file_that_shrinks_while_it_is_read_is_a_finding(make, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make()
    pieces = deep._pieces

    def shrink(root: Path, entry: TensorEntry):
        with (root / entry.file).open("r+b") as stream:
            stream.truncate(entry.start + 1)
        return pieces(root, entry)

    monkeypatch.setattr(deep, "_pieces", shrink)
    assert not doctor(directory, deep=True).healthy
