"""Foreign formats have a name: one finding with what to take instead, however many tensors there are."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.modules import stage_modules
from exo_kimi.checkpoint.doctor.doctor import doctor
from exo_kimi.checkpoint.doctor.findings import MOST_LINES
from exo_kimi.checkpoint.doctor.report import inspect
from exo_kimi.checkpoint.formats import FORMATS, IMPOSTORS, format_of_tensors, impostor
from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import resolve
from exo_kimi.checkpoint.safetensors_io import StoredTensor, read_header, write_file
from exo_kimi.errors import CheckpointProblems, ForeignFormatError, TensorFileError
from tests.work import calls_of

Make = Callable[..., Path]
Parts = Callable[[int, int], Mapping[str, StoredTensor]]


def u8(*shape: int) -> StoredTensor:
    return StoredTensor("U8", np.ones(shape, np.uint8))


def f8(*shape: int) -> StoredTensor:
    return StoredTensor("F8_E4M3", np.ones(shape, np.uint8))


def f32(*shape: int) -> StoredTensor:
    return StoredTensor("F32", np.ones(shape, np.float32))


def i32(*shape: int) -> StoredTensor:
    return StoredTensor("I32", np.ones(shape, np.int32))


# What each format puts in place of an expert's weight (out, in).
LAYOUTS: dict[str, tuple[Parts, dict[str, Any], str]] = {
    "ModelOpt NVFP4": (
        lambda o, i: {
            "weight": u8(o, i // 2),
            "weight_scale": f8(o, i // 16),
            "weight_scale_2": f32(1),
            "input_scale": f32(1),
        },
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        "ModelOpt NVFP4",
    ),
    "compressed-tensors NVFP4": (
        lambda o, i: {
            "weight_packed": u8(o, i // 2),
            "weight_scale": f8(o, i // 16),
            "weight_global_scale": f32(1),
            "input_global_scale": f32(1),
        },
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
        "compressed-tensors NVFP4",
    ),
    "JANGTQ": (
        lambda o, i: {"tq_packed": u8(o, i // 4), "tq_norms": f32(o), "tq_bits": i32(1)},
        {},
        "JANGTQ",
    ),
    "Quark MXFP4": (
        lambda o, i: {"weight": u8(o, i // 2), "weight_scale": u8(o, i // 32)},
        {"quant_method": "quark"},
        "AMD Quark",
    ),
    "AWQ": (
        lambda o, i: {"qweight": i32(i, o // 8), "qzeros": i32(i // 32, o // 8), "scales": f32(i // 32, o)},
        {"quant_method": "awq", "bits": 4},
        "AWQ",
    ),
    "GPTQ": (
        lambda o, i: {
            "qweight": i32(i // 8, o),
            "qzeros": i32(i // 32, o // 8),
            "scales": f32(i // 32, o),
            "g_idx": i32(i),
        },
        {"quant_method": "gptq", "bits": 4},
        "GPTQ",
    ),
    "bitsandbytes": (
        lambda o, i: {"weight": u8(o * i // 2, 1), "weight.absmax": f32(o), "weight.quant_map": f32(16)},
        {"quant_method": "bitsandbytes"},
        "bitsandbytes",
    ),
    "int8 for each channel": (
        lambda o, i: {"weight": StoredTensor("U8", np.ones((o, i), np.uint8)), "weight_scale": f32(o, 1)},
        {"quant_method": "compressed-tensors", "format": "int-quantized"},
        "INT8 or FP8 for each channel",
    ),
    "EETQ": (
        lambda o, i: {"weight": u8(i, o), "weight_scales": f32(o)},
        {"quant_method": "eetq"},
        "EETQ",
    ),
}


@pytest.fixture
def foreign(make: Make) -> Callable[[str], Path]:
    """A small checkpoint whose experts are in a foreign format."""

    def build(name: str) -> Path:
        parts, section, _ = LAYOUTS[name]
        directory = make(layout="bf16", shards=1, config={"quantization_config": section} if section else {})
        path = directory / "model.safetensors"
        data = path.read_bytes()
        kept: dict[str, StoredTensor] = {}
        for entry in read_header(path)[1]:
            if ".experts." not in entry.name:
                kind = {"BF16": np.uint16, "F32": np.float32}[entry.dtype]
                kept[entry.name] = StoredTensor(
                    entry.dtype, np.frombuffer(data[entry.start : entry.end], kind).reshape(entry.shape)
                )
            else:
                base = entry.name.removesuffix(".weight")
                kept |= {f"{base}.{part}": tensor for part, tensor in parts(*entry.shape).items()}
        write_file(path, kept)
        return directory

    return build


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_foreign_format_is_one_finding_with_its_name_and_what_to_take(
    foreign: Callable[[str], Path], name: str
) -> None:
    directory, expected = foreign(name), LAYOUTS[name][2]
    (finding,) = doctor(directory).errors
    assert isinstance(finding.error, ForeignFormatError), str(finding.error)
    assert expected in finding.error.what
    assert "MLX conversion" in str(finding.error.fix)
    with pytest.raises(CheckpointProblems) as caught:
        resolve(open_index(directory))
    assert [type(problem) for problem in caught.value.problems] == [ForeignFormatError]
    assert [type(problem) for problem in inspect(directory).problems] == [ForeignFormatError]


def test_a_config_that_still_names_where_it_was_converted_from_is_no_finding(make: Make) -> None:
    directory = make(config={"quantization_config": {"quant_method": "modelopt", "bits": 4, "group_size": 64}})
    (directory / "hf_quant_config.json").write_text("{}")
    assert not doctor(directory).errors


@pytest.mark.parametrize(
    ("file", "name"),
    [("model-Q4_K_M.gguf", "GGUF"), ("weights.00.npz", "npz"), ("tf_model.h5", "HDF5"), ("m.onnx", "ONNX")],
)
def test_a_folder_of_other_weight_files_has_a_name(make: Make, file: str, name: str) -> None:
    directory = make()
    for path in directory.glob("model*.safetensors*"):
        path.unlink()
    (directory / file).write_bytes(b"GGUF")
    with pytest.raises(ForeignFormatError, match=name):
        open_index(directory)
    assert any(isinstance(f.error, ForeignFormatError) and name in f.error.what for f in doctor(directory).errors)


@pytest.mark.parametrize("content", [
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5",
    b"<!DOCTYPE html><html>Sign in</html>",
    b"<html><body>404</body></html>",
    b'{"error":"Repository not found"}',
    b"Entry not found",
    b"GGUF\x03\x00\x00\x00" + bytes(100),
    b"PK\x03\x04" + bytes(100),
    bytes(4096),
])  # fmt: skip
def test_what_was_saved_as_a_shard_and_is_none_is_said(make: Make, content: bytes) -> None:
    directory = make(shards=2)
    path = directory / "model-00001-of-00002.safetensors"
    path.write_bytes(content)
    errors = [finding.error for finding in doctor(directory).errors]
    said = [error for error in errors if error.what.startswith(f"{path.name} is not a safetensors file: it is ")]
    assert len(said) == 1
    assert isinstance(said[0], TensorFileError)
    known = impostor(content[:8])
    assert known is not None
    assert (said[0].what, said[0].fix) == (
        f"{path.name} is not a safetensors file: it is {known[0]}",
        known[1],
    )
    assert len(errors) == 1, "what lies in it is not missing besides"


def test_no_safetensors_file_is_taken_for_another(make: Make) -> None:
    for path in make().glob("*.safetensors"):
        assert impostor(path.read_bytes()[:8]) is None
    assert all(len(magic) <= 8 for magic, _, _ in IMPOSTORS)


def test_the_table_names_each_format_once_and_reads_what_exo_kimi_reads(make: Make) -> None:
    assert len({each.name for each in FORMATS}) == len(FORMATS)
    for field in ("suffixes", "methods", "files"):
        values = [value for each in FORMATS for value in getattr(each, field)]
        assert len(set(values)) == len(values), field
    for options in ({}, {"layout": "int4"}, {"layout": "fp8"}, {"layout": "bf16"}, {"vision": True}):
        assert format_of_tensors(open_index(make(**options)).tensors, where="test") is None


def write_headers(root: Path, tensors: Mapping[str, tuple[str, list[int], int]], files: int) -> None:
    """Weight files with sound headers over nothing: sparse, of the right length."""
    names, weight_map = list(tensors), {}
    for number in range(files):
        header: dict[str, Any] = {}
        offset, file = 0, f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        for name in names[number * len(names) // files : (number + 1) * len(names) // files]:
            dtype, shape, size = tensors[name]
            end = offset + size * int(np.prod(shape, dtype=np.int64))
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
            offset, weight_map[name] = end, file
        text = json.dumps(header).encode()
        with (root / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + offset)
    (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture(scope="module")
def k2_nvfp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The headers of a ModelOpt NVFP4 of K2: 277,335 tensors."""
    from exo_kimi.checkpoint.tiny.config import text_config
    from tests.checkpoint.conftest import K2

    root = tmp_path_factory.mktemp("nvfp4")
    raw = text_config(K2, dtype="BF16")
    raw["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    (root / "config.json").write_text(json.dumps(raw))
    tensors: dict[str, tuple[str, list[int], int]] = {}
    for spec in stage_modules(KimiConfig.from_dict(raw), 0, 61):
        if spec.kind != "experts":
            tensors[f"{spec.path}.weight"] = ("BF16", list(spec.shape), 2)
            if spec.kind == "router":
                tensors[f"{spec.path}.e_score_correction_bias"] = ("F32", [384], 4)
            continue
        out, into = spec.shape[1:]
        for expert in range(384):
            path = spec.path.replace(".switch_mlp.", f".experts.{expert}.")
            tensors[f"{path}.weight"] = ("U8", [out, into // 2], 1)
            tensors[f"{path}.weight_scale"] = ("F8_E4M3", [out, into // 16], 1)
            tensors[f"{path}.weight_scale_2"] = ("F32", [], 4)
            tensors[f"{path}.input_scale"] = ("F32", [], 4)
    assert len(tensors) == 277_335
    write_headers(root, tensors, 119)
    return root


def test_a_quarter_of_a_million_foreign_tensors_are_one_finding(k2_nvfp4: Path) -> None:
    diagnosis, calls = calls_of(lambda: doctor(k2_nvfp4))
    text = diagnosis.to_text()
    weights = [f.error for f in diagnosis.errors if not f.error.what.startswith(("tiktoken", "tokenizer"))]
    assert [type(error) for error in weights] == [ForeignFormatError]
    assert "69,120 of 277,335 tensors" in str(weights[0])
    assert text.count("\n") < MOST_LINES
    assert calls < 40 * 277_335  # 26 of each tensor's
    assert len(diagnosis.to_json()) < 10_000


def test_a_report_does_not_grow_with_the_checkpoint(make: Make) -> None:
    """Three thousand findings of five kinds: forty lines with counts and examples, and all of them as JSON."""
    directory = make(layout="bf16", shards=1)
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    for number in range(600):
        for kind in ("gate_proj", "up_proj", "down_proj"):
            header[f"model.layers.1.mlp.experts.{100 + number}.{kind}.weight"] = {
                "dtype": "U8", "shape": [0], "data_offsets": [0, 0]
            }  # fmt: skip
        header[f"model.layers.{100 + number}.input_layernorm.weight"] = {
            "dtype": "U8", "shape": [0], "data_offsets": [0, 0]
        }  # fmt: skip
        header[f"odd.{number}.name"] = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    diagnosis = doctor(directory)
    assert len(diagnosis.findings) >= 3_000
    lines = diagnosis.to_text().splitlines()
    assert len(lines) <= MOST_LINES
    assert max(map(len, lines)) < 300
    shown = "\n".join(lines)
    assert "1,799 more, such as" in shown, shown
    assert "errors" in lines[-1]
    assert len(json.loads(diagnosis.to_json())["findings"]) == len(diagnosis.findings)
