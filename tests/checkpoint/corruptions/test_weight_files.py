"""Damage to weight files: cut, flipped, mislabelled, renamed, missing, exchanged."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from exo_kimi.checkpoint.doctor.doctor import doctor

Patient = Any  # see conftest.py, which cannot be imported
INDEX = "model.safetensors.index.json"
FILES = "TensorFileError"


def data_truncated(p: Patient) -> None:
    p.edit(p.shard, lambda data: data[: -p.random.randint(1, len(data) - p.header_bytes(p.shard))])


def header_truncated(p: Patient) -> None:
    p.edit(p.shard, lambda data: data[: p.random.randrange(p.header_bytes(p.shard))])


def bytes_appended(p: Patient) -> None:
    p.edit(p.shard, lambda data: data + p.random.randbytes(p.random.randint(1, 99)))


def header_byte_flipped(p: Patient) -> None:
    def flip(data: bytearray) -> None:
        data[p.random.randrange(8, p.header_bytes(p.shard))] ^= p.random.randint(1, 255)

    p.edit(p.shard, flip)


def length_byte_flipped(p: Patient) -> None:
    def flip(data: bytearray) -> None:
        data[p.random.randrange(8)] ^= p.random.randint(1, 255)

    p.edit(p.shard, flip)


def shape_swapped(p: Patient) -> None:
    def swap(header: dict[str, Any]) -> None:
        names = [n for n, e in header.items() if "layers" in n and len({*e["shape"]}) > 1]
        header[p.random.choice(names)]["shape"].reverse()

    p.edit_header(swap)


def shape_halved_and_doubled(p: Patient) -> None:
    def reshape(header: dict[str, Any]) -> None:
        names = [n for n, e in header.items() if "layers" in n and len(e["shape"]) > 1 and not e["shape"][-1] % 2]
        shape = header[p.random.choice(names)]["shape"]
        shape[-1] //= 2
        shape[0] *= 2

    p.edit_header(reshape)


def dtype_relabelled(p: Patient) -> None:
    others = {
        "BF16": ("F16", "I16", "U16"),
        "F32": ("I32", "U32"),
        "U32": ("I32", "F32"),
        "I32": ("F32",),
        "F8_E4M3": ("F8_E5M2", "I8", "U8", "BOOL"),
    }

    def relabel(header: dict[str, Any]) -> None:
        entry = header[p.a_name(header)]
        entry["dtype"] = p.random.choice(others[entry["dtype"]])

    p.edit_header(relabel)


def tensor_renamed(p: Patient) -> None:
    def rename(header: dict[str, Any]) -> None:
        name = p.a_name(header)
        odd = name.replace("layers.", "layer.") if p.random.random() < 0.5 else f"{name}_old"
        header[odd if odd != name else f"x.{name}"] = header.pop(name)

    p.edit_header(rename)


def tensor_dropped_from_the_header(p: Patient) -> None:
    p.edit_header(lambda header: header.pop(p.a_name(header)))


def tensor_removed_everywhere(p: Patient) -> None:
    p.edit_tensors(lambda tensors: tensors.pop(p.a_name(tensors)), index=True)


def layer_renumbered_everywhere(p: Patient) -> None:
    def renumber(tensors: dict[str, Any]) -> None:
        name = p.a_name(tensors, r"layers\.\d")
        tensors[re.sub(r"layers\.\d+", "layers.7", name)] = tensors.pop(name)

    p.edit_tensors(renumber, index=True)


def tensor_added_everywhere(p: Patient) -> None:
    p.edit_tensors(lambda tensors: tensors.update({"model.layers.1.adapter.weight": ("F32", [1], b"abcd")}), index=True)


def columns_of_other_bits(p: Patient) -> None:
    """A sound file whose packed or plain rows have another width: over 8 bits, which is no packing of any tensor."""

    def widen(tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
        name = p.a_name({n: t for n, t in tensors.items() if len(t[1]) > 1})
        dtype, shape, data = tensors[name]
        by = 2 * shape[-1] + p.random.choice((0, 1, 2, 3, 5))
        row_bytes = len(data) // shape[-1]
        tensors[name] = (dtype, [*shape[:-1], shape[-1] + by], data + bytes(row_bytes * by))

    p.edit_tensors(widen, index=True)


def expert_unlike_the_others(p: Patient) -> None:
    def retype(tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
        name = p.a_name(tensors, r"experts\.\d+.*(weight|weight_scale|weight_packed)$")
        dtype, shape, data = tensors[name]
        tensors[name] = (dtype, [shape[0] * 2, *shape[1:]], data * 2)

    p.shard = next(s for s in p.shards if b".experts.2.up_proj.weight" in (p.root / s).read_bytes())
    p.edit_tensors(retype, index=True)


def tensor_in_two_files(p: Patient) -> None:
    source = p.shard
    p.shard = next(s for s in p.shards if s != source)
    name = p.a_name(json.loads((p.root / source).read_bytes()[8 : p.header_bytes(source)]))
    p.edit_tensors(lambda tensors: tensors.update({name: ("BF16", [2], b"abcd")}), index=False)
    if p.random.random() < 0.5:
        (p.root / INDEX).unlink()


def offsets_shifted(p: Patient) -> None:
    def shift(header: dict[str, Any]) -> None:
        offsets = header[p.a_name(header)]["data_offsets"]
        for place in p.random.choice(((0,), (1,), (0, 1))):
            offsets[place] += p.random.choice((-8, -1, 1, 64, 2**40))

    p.edit_header(shift)


def header_entry_of_the_wrong_form(p: Patient) -> None:
    odd: list[Any] = [None, 7, "x", [], {}, -1, 1e9, [1.5], [-1, 2], [10**30] * 3, True, ["\ud800"]]

    def spoil(header: dict[str, Any]) -> None:
        name = p.a_name(header)
        key = p.random.choice(("dtype", "shape", "data_offsets", ""))
        value = p.random.choice([v for v in odd if key != "shape" or v != []])
        if key:
            header[name][key] = value
        else:
            header[name] = value

    p.edit_header(spoil)


def header_is_no_object(p: Patient) -> None:
    texts = (b"[]", b"null", b"{" * 50_000, b"[" * 50_000, b"\xff\xfe{}", b'{"a": 1', b'"x"')
    p.edit_header(lambda _: p.random.choice(texts))


def shard_deleted(p: Patient) -> None:
    (p.root / p.shard).unlink()
    if p.random.random() < 0.5:
        (p.root / INDEX).unlink()


def shard_of_noise(p: Patient) -> None:
    p.write(p.shard, p.random.randbytes(p.random.choice((0, 5, 8, 4000))))


def shard_is_a_directory(p: Patient) -> None:
    (p.root / p.shard).unlink()
    (p.root / p.shard).mkdir()


def shards_exchanged(p: Patient) -> None:
    one, two = ((p.root / name).read_bytes() for name in p.shards[:2])
    p.write(p.shards[0], two)
    p.write(p.shards[1], one)


def shard_renamed(p: Patient) -> None:
    (p.root / p.shard).rename(p.root / f"model-{p.random.randint(100, 999)}.safetensors")


def weights_pickled(p: Patient) -> None:
    for shard in p.shards:
        (p.root / shard).unlink()
    (p.root / INDEX).unlink()
    p.write("pytorch_model.bin", b"cos\nsystem\n(S'false'\ntR.")


KINDS = [
    (data_truncated, FILES, 3, ""),
    (header_truncated, FILES, 3, ""),
    (bytes_appended, FILES, 2, ""),
    (header_byte_flipped, "", 30, ""),
    (length_byte_flipped, FILES, 4, ""),
    (shape_swapped, "ShapeMismatchError QuantizationError", 4, ""),
    (shape_halved_and_doubled, "ShapeMismatchError QuantizationError", 4, ""),
    (
        dtype_relabelled,
        "DtypeError ShapeMismatchError QuantizationError MissingTensorError UnexpectedTensorError",
        4,
        "",
    ),
    (tensor_renamed, "TensorFileError MissingTensorError UnexpectedTensorError", 3, ""),
    (tensor_dropped_from_the_header, FILES, 2, ""),
    (tensor_removed_everywhere, "MissingTensorError", 4, ""),
    (layer_renumbered_everywhere, "MissingTensorError UnexpectedTensorError", 2, ""),
    (tensor_added_everywhere, "UnexpectedTensorError", 2, ""),
    (columns_of_other_bits, "QuantizationError ShapeMismatchError", 4, ""),
    (expert_unlike_the_others, "QuantizationError", 2, "int4 fp8 bf16"),
    (tensor_in_two_files, "UnexpectedTensorError TensorFileError", 2, ""),
    (offsets_shifted, FILES, 4, ""),
    (header_entry_of_the_wrong_form, FILES, 6, ""),
    (header_is_no_object, FILES, 4, ""),
    (shard_deleted, "TensorFileError NotACheckpointError", 2, ""),
    (shard_of_noise, FILES, 2, ""),
    (shard_is_a_directory, "TensorFileError", 2, ""),
    (shards_exchanged, FILES, 2, ""),
    (shard_renamed, FILES, 2, ""),
    (weights_pickled, "UnsafeFormatError", 1, ""),
]


def test_damage_is_named_and_never_loaded_as_another_model(
    endure, layout: str, damage: Callable[[Patient], None], errors: str, times: int
) -> None:
    for number in range(times):
        endure(layout, damage, errors, number)


def test_there_are_at_least_500_corruptions() -> None:
    """Of weight files alone, in six layouts; the other files here add as many."""
    assert 6 * sum(times for _, _, times, layouts in KINDS if not layouts) >= 500


def test_a_sound_checkpoint_has_no_findings(healthy, watch_headers, layout: str) -> None:
    root, _ = healthy(layout)
    with watch_headers():
        assert doctor(root).findings == ()
