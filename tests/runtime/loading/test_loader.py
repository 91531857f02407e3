"""Loading: every layout, every wrong config, only the own bytes, nothing missing and nothing left over."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import exo_kimi
from exo_kimi.checkpoint import packing
from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import StageManifest, resolve
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import (
    CheckpointProblems,
    MissingTensorError,
    QuantizationError,
    SplitError,
    TensorFileError,
    UnexpectedTensorError,
    UsageError,
)
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.runtime.loading import filling, parameter_memory, tensor_reader
from exo_kimi.runtime.loading.loader import load, load_stage

SMALL = {
    "num_hidden_layers": 3,
    "hidden_size": 192,  # not a multiple of FP8's 128: ragged blocks
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "mlx mixed346": {},
    "mlx mixed346 absorbed": {"absorbed": True},
    "mlx dq3 k25": {"recipe": "dq3", "prefix": True, "vision": True},
    "mlx plain": {"recipe": "plain"},
    "int4": {"layout": "int4"},
    "int4 k25": {"layout": "int4", "prefix": True, "vision": True, "shards": 1},
    "fp8": {"layout": "fp8"},
    "bf16": {"layout": "bf16"},
    "fp16": {"layout": "bf16", "dtype": "F16"},
    "fp32": {"layout": "bf16", "dtype": "F32", "shards": 3},
}


def make(directory: Path, **options: Any) -> Path:
    config = {**SMALL, **options.pop("config", {})}
    return make_tiny(directory, seed=7, config=config, **options)


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A checkpoint that tests only read, made once for each set of options."""
    made: dict[str, Path] = {}

    def get(**options: Any) -> Path:
        key = repr(sorted(options.items()))
        if key not in made:
            made[key] = make(tmp_path_factory.mktemp("stored"), **options)
        return made[key]

    return get


def manifest_of(directory: Path, start_layer: int = 0, end_layer: int | None = None) -> StageManifest:
    return resolve(open_index(directory), start_layer, end_layer)


def parameters(model: Model) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def same(found: Model, expected: Model) -> bool:
    ours, theirs = parameters(found), parameters(expected)
    return ours.keys() == theirs.keys() and all(mx.array_equal(ours[name], theirs[name]) for name in theirs)


def logits(model: Model) -> mx.array:
    return model(mx.arange(20)[None])


def on_disk(directory: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor as numpy sees it (BF16 and FP8 as raw words), read by plain slicing."""
    kinds = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "U32": "<u4", "I32": "<i4", "U8": "u1", "F8_E4M3": "u1"}
    return {
        name: np.frombuffer((directory / entry.file).read_bytes()[entry.start : entry.end], kinds[entry.dtype]).reshape(
            entry.shape
        )
        for name, entry in open_index(directory).tensors.items()
    }


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int, int]]]:
    """Every (file, start, end) that preadv delivers."""
    seen: list[tuple[str, int, int]] = []
    real = os.preadv

    def spy(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        count = real(descriptor, buffers, offset)
        link = Path(f"/proc/self/fd/{descriptor}")
        name = link.readlink().name if link.exists() else ""
        seen.append((name, offset, offset + count))
        return count

    monkeypatch.setattr(tensor_reader.os, "preadv", spy)
    yield seen


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_loads_and_answers(stored: Callable[..., Path], options: dict[str, Any]) -> None:
    model = load(stored(**options), dtype="float32")
    assert not model.training
    assert bool(mx.isfinite(logits(model)).all())


def test_mlx_tensors_arrive_bit_for_bit(stored: Callable[..., Path]) -> None:
    directory = stored()
    found, tensors = parameters(load(directory)), on_disk(directory)
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        raw = found[name].view({2: mx.uint16, 4: mx.uint32}[value.dtype.itemsize])
        assert np.array_equal(np.array(raw), value.view(f"<u{value.dtype.itemsize}")), name


def test_int4_experts_are_stacked_without_repacking(stored: Callable[..., Path]) -> None:
    directory = stored(layout="int4")
    tensors, experts = on_disk(directory), load(directory).layers[1].mlp.switch_mlp
    for expert in range(SMALL["n_routed_experts"]):
        prefix = f"model.layers.1.mlp.experts.{expert}.down_proj"
        assert np.array_equal(
            np.array(experts.down_proj.weight[expert]).view(np.int32), tensors[f"{prefix}.weight_packed"]
        )
        codes = packing.unpack_bits(tensors[f"{prefix}.weight_packed"].view(np.uint32), 4).astype(np.float32) - 8
        scales = (tensors[f"{prefix}.weight_scale"].astype(np.uint32) << 16).view(np.float32)
        module = experts.down_proj
        values = mx.dequantize(
            module.weight[expert],
            module.scales[expert].astype(mx.float32),
            module.biases[expert].astype(mx.float32),
            group_size=32,
            bits=4,
        )
        np.testing.assert_array_equal(np.array(values), codes * scales.repeat(32, -1))


def test_fp8_becomes_the_bf16_nearest_to_the_float32_product(stored: Callable[..., Path]) -> None:
    directory = stored(layout="fp8")
    tensors, model = on_disk(directory), load(directory)

    def expected(prefix: str) -> np.ndarray[Any, Any]:
        product = packing.dequantize_fp8(tensors[f"{prefix}.weight"], tensors[f"{prefix}.weight_scale_inv"])
        return packing.store(product, "BF16").data

    kv_a = model.layers[2].self_attn.kv_a_proj_with_mqa.weight
    assert kv_a.shape[0] % 128 and kv_a.shape[1] % 128, "the case has ragged blocks"
    assert np.array_equal(np.array(kv_a.view(mx.uint16)), expected("model.layers.2.self_attn.kv_a_proj_with_mqa"))
    up = model.layers[2].mlp.switch_mlp.up_proj.weight.view(mx.uint16)
    for expert in range(SMALL["n_routed_experts"]):
        assert np.array_equal(np.array(up[expert]), expected(f"model.layers.2.mlp.experts.{expert}.up_proj"))


def test_experts_one_by_one_and_stacked_are_the_same_model(tmp_path: Path) -> None:
    one_by_one = load(make(tmp_path / "a", layout="bf16"))
    stacked = load(make(tmp_path / "b", recipe="plain"))
    assert same(one_by_one, stacked)


def wrong_hints(directory: Path, hints: dict[str, Any]) -> None:
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    raw["quantization"] = raw["quantization_config"] = hints
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("options", "hints"),
    [
        ({}, None),
        ({"recipe": "uniform3"}, {"bits": 4, "group_size": 64}),
        ({"recipe": "mixed346"}, {"bits": 4, "group_size": 64}),
        ({}, {"bits": 4, "group_size": 64, "model.layers.1.self_attn.o_proj": {"bits": 8, "group_size": 64}}),
        ({}, {"bits": 4, "group_size": 64, "model.layers.1.mlp.switch_mlp.up_proj": {"bits": 4, "group_size": 64}}),
    ],
    ids=[
        "right",
        "wrong global bits",
        "experts 3, rest 6, under a global 4",
        "wrong entry on a linear",
        "wrong entry on an expert stack",
    ],
)
def test_the_load_matrix_what_is_on_disk_wins(
    tmp_path: Path, options: dict[str, Any], hints: dict[str, Any] | None
) -> None:
    right = load(make(tmp_path / "right", dtype="F32", **options))
    directory = make(tmp_path / "wrong", dtype="F32", **options)
    if hints is not None:
        wrong_hints(directory, hints)
    found = load(directory)
    assert same(found, right)
    assert mx.array_equal(logits(found), logits(right))


def test_the_load_matrix_a_missing_tensor_is_named_before_any_weight_is_read(
    tmp_path: Path, reads: list[tuple[str, int, int]]
) -> None:
    directory = make(tmp_path, shards=1)
    path, name = directory / "model.safetensors", "model.layers.1.mlp.switch_mlp.down_proj.scales"
    tensors = mx.load(str(path))
    del tensors[name]
    mx.save_safetensors(str(path), tensors)
    with pytest.raises(CheckpointProblems, match=name):
        load(directory)
    assert reads == []


def test_the_load_matrix_a_truncated_file_is_named_before_any_weight_is_read(
    tmp_path: Path, reads: list[tuple[str, int, int]]
) -> None:
    directory = make(tmp_path)
    path = directory / "model-00002-of-00002.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(CheckpointProblems, match=path.name):
        load(directory)
    assert reads == []


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files come from /proc")
@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("layers", [(0, 3), (1, 2), (1, 3)], ids=str)
def test_a_stage_reads_its_own_byte_ranges_once_and_no_others(
    stored: Callable[..., Path],
    reads: list[tuple[str, int, int]],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    layers: tuple[int, int],
) -> None:
    monkeypatch.setattr(tensor_reader, "READERS", 1)  # with several, small reads overtake one another
    manifest = manifest_of(stored(**options), *layers)
    load_stage(manifest)
    own = [entry for source in manifest.sources for entries in source.parts.values() for entry in entries]
    assert sorted(reads) == sorted((entry.file, entry.start, entry.end) for entry in own)
    assert sum(end - start for _, start, end in reads) == manifest.disk_bytes
    if options.get("layout") != "fp8":  # there, a matrix and its factors are read together
        assert reads == sorted(reads)


RESIDENT = """
import sys
import mlx.core as mx
from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import resolve
from exo_kimi.runtime.loading.loader import load_stage
for start, end in ((0, 7), (2, 4)):
    manifest = resolve(open_index(sys.argv[1]), start, end)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = load_stage(manifest)
    print(mx.get_active_memory() - before, mx.get_peak_memory() - before, manifest.resident_bytes, manifest.disk_bytes)
    del model
"""


@pytest.mark.parametrize(
    "options", [{}, {"absorbed": True}, {"layout": "int4"}, {"layout": "fp8"}, {"layout": "bf16"}], ids=str
)
def test_only_the_stages_own_bytes_stay_resident(tmp_path: Path, options: dict[str, Any]) -> None:
    make_tiny(tmp_path, **options)
    command = [sys.executable, "-c", RESIDENT, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    for line in ran.stdout.splitlines():
        active, peak, expected, disk = map(int, line.split())
        assert 0.99 * expected <= active <= 1.05 * expected
        # While loading: one matrix of FP8 in several forms, and what biases are made from.
        assert peak <= 1.05 * expected + 2**20
        if options.get("layout") not in ("int4", "fp8"):
            assert expected == disk


def test_short_reads_are_continued(stored: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    directory = stored(layout="fp8")
    expected = load(directory)
    real = os.preadv
    monkeypatch.setattr(tensor_reader.os, "preadv", lambda fd, buffers, at: real(fd, [buffers[0][:1001]], at))
    assert same(load(directory), expected)


def test_a_file_cut_after_its_header_was_read_is_an_error(tmp_path: Path) -> None:
    manifest = manifest_of(make(tmp_path))
    path = tmp_path / "model-00002-of-00002.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(TensorFileError, match=r"model-00002-of-00002.safetensors ends inside \S+") as caught:
        load_stage(manifest)
    assert "download or copy it again" in str(caught.value)


def test_a_file_gone_after_its_header_was_read_is_an_error(tmp_path: Path) -> None:
    manifest = manifest_of(make(tmp_path))
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(TensorFileError, match="cannot read"):
        load_stage(manifest)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layout", ["mlx mixed346", "int4", "fp8", "bf16", "fp32"])
def test_every_floating_parameter_follows_dtype(
    stored: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, layout: str, dtype: str
) -> None:
    directory = stored(**LAYOUTS[layout])
    as_stored = parameters(load(directory))
    monkeypatch.setattr(filling, "STAGING_BYTES", 1000)
    wanted = getattr(mx, dtype)
    for name, value in parameters(load(directory, dtype=dtype)).items():
        if name.endswith("e_score_correction_bias"):
            assert value.dtype == mx.float32
        elif mx.issubdtype(as_stored[name].dtype, mx.floating):
            assert value.dtype == wanted, name
            assert mx.array_equal(value, as_stored[name].astype(wanted)), name
        else:
            assert value.dtype == as_stored[name].dtype == mx.uint32
            assert mx.array_equal(value, as_stored[name])


def test_progress_counts_every_byte(stored: Callable[..., Path]) -> None:
    manifest = manifest_of(stored(), 1, 3)
    seen: list[tuple[int, int]] = []
    load_stage(manifest, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {manifest.disk_bytes}
    assert seen[-1][0] == manifest.disk_bytes


def test_layers_only_leaves_out_embedding_and_head(stored: Callable[..., Path]) -> None:
    manifest = manifest_of(stored())
    model = load_stage(manifest, layers_only=True)
    assert all(name.startswith("model.layers.") for name in parameters(model))
    assert not model.is_first and not model.is_last


def test_stages_of_a_checkpoint_compute_what_the_whole_does(stored: Callable[..., Path]) -> None:
    directory = stored()
    hidden = mx.arange(20)[None]
    for start in range(3):
        hidden = load(directory, start, start + 1, dtype="float32")(hidden)
    whole = logits(load(directory, dtype="float32"))
    np.testing.assert_allclose(np.array(hidden), np.array(whole), atol=1e-5)


def test_a_manifest_that_does_not_fit_the_model_is_refused(stored: Callable[..., Path]) -> None:
    manifest = manifest_of(stored())
    first, *rest = manifest.sources
    with pytest.raises(MissingTensorError, match="have no tensor"):
        load_stage(dataclasses.replace(manifest, sources=tuple(rest)))
    with pytest.raises(UnexpectedTensorError, match="two sources"):
        load_stage(dataclasses.replace(manifest, sources=(first, *manifest.sources)))
    with pytest.raises(UnexpectedTensorError, match="have no parameter"):
        load_stage(dataclasses.replace(manifest, end_layer=2))


def test_an_int4_shape_that_contradicts_the_architecture_is_refused(tmp_path: Path) -> None:
    manifest = manifest_of(make(tmp_path, layout="int4"))
    entry = next(iter(s.parts["weight_shape"][3] for s in manifest.sources if s.layout == "int4"))
    with (tmp_path / entry.file).open("r+b") as stream:
        stream.seek(entry.start)
        stream.write(np.array([64, 64], np.int32).tobytes())
    with pytest.raises(QuantizationError, match="weight_shape"):
        load_stage(manifest)


def test_wrong_arguments_are_refused(stored: Callable[..., Path]) -> None:
    directory = stored()
    with pytest.raises(UsageError, match="unknown dtype"):
        load(directory, dtype="float8")
    with pytest.raises(SplitError):
        load(directory, 2, 9)


def test_the_package_loads_lazily() -> None:
    assert exo_kimi.load is load
    assert exo_kimi.__version__
    code = "import sys, exo_kimi; exo_kimi.__version__; sys.exit('mlx' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


FUSED = {
    "mlx": {"recipe": "uniform4"},
    "absorbed": {"recipe": "uniform4", "absorbed": True},
    "mixed": {},
    "int4": {"layout": "int4"},
    "fp8": {"layout": "fp8"},
}


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("options", FUSED.values(), ids=FUSED)
def test_projections_read_into_one_array_keep_their_parameters(
    stored: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], dtype: str | None
) -> None:
    directory = stored(**options)
    expected = parameters(load(directory, dtype=dtype))
    real = os.preadv
    monkeypatch.setattr(tensor_reader.os, "preadv", lambda fd, buffers, at: real(fd, [buffers[0][:1001]], at))
    model = load(directory, dtype=dtype, fuse=True)
    assert any(layer.mlp.switch_mlp.fused is not None for layer in model.layers[1:])
    assert not list(model.groups())
    for name, value in parameters(model).items():
        wanted = expected[name].astype(mx.float32) if name.endswith("mlp.gate.weight") else expected[name]
        assert value.dtype == wanted.dtype and mx.array_equal(value, wanted), name


def test_a_large_tensor_is_read_in_pieces_at_once(stored: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    directory = stored(recipe="uniform4")
    expected = parameters(load(directory, fuse=True))
    monkeypatch.setattr(tensor_reader, "READ_BYTES", 1000)
    monkeypatch.setattr(tensor_reader, "READ_PIECES", 3)
    found = parameters(load(directory, fuse=True))
    assert all(mx.array_equal(found[name], value) for name, value in expected.items())


def test_memory_is_made_ready_without_a_change_to_what_it_holds() -> None:
    memory = memoryview(bytearray(range(256)) * 2048)
    tensor_reader.make_ready([memory[100:300_000], memory[400_000:400_010]])
    assert memory == bytes(range(256)) * 2048


def test_unfilled_arrays_are_writable_in_place_and_apart() -> None:
    forms = [((3, 5), mx.uint32), ((7,), mx.uint8), ((2, 2, 9), mx.uint16)] * 40
    arrays = parameter_memory.unfilled(forms)
    for number, array in enumerate(arrays):
        data = memoryview(array).cast("B")
        data[:] = bytes([number]) * len(data)
    for number, (array, (shape, dtype)) in enumerate(zip(arrays, forms, strict=True)):
        assert (array.shape, array.dtype) == (shape, dtype)
        assert set(np.array(array.view(mx.uint8)).ravel().tolist()) == {number}


def test_memory_is_left_unfilled_only_where_nobody_else_uses_mlx(
    stored: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLX's thread would need Python's lock, which a thread that waits for it may hold: such loads hung."""
    manifest = resolve(open_index(stored(recipe="uniform4")), 0, None)
    monkeypatch.setattr(parameter_memory, "SMALL_BYTES", 1)
    asked: list[object] = []
    give = parameter_memory.mx.load
    monkeypatch.setattr(parameter_memory.mx, "load", lambda *given, **more: asked.append(given) or give(*given, **more))
    expected = load_stage(manifest, fuse=True)
    assert not asked
    assert same(load_stage(manifest, fuse=True, alone=True), expected)
    assert asked


def test_where_mlx_gives_no_unfilled_memory_zeros_are_filled(
    stored: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = resolve(open_index(stored(recipe="uniform4")), 0, None)
    monkeypatch.setattr(parameter_memory, "SMALL_BYTES", 1)
    expected = load_stage(manifest, fuse=True)

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("[load] no such file")

    monkeypatch.setattr(parameter_memory.mx, "load", refuse)
    assert same(load_stage(manifest, fuse=True, alone=True), expected)


def test_an_array_that_was_not_filled_to_its_last_byte_is_not_taken() -> None:
    half = parameter_memory.Target((4, 8), mx.float32, parts=2)
    memory = parameter_memory.ParameterMemory([[half]])
    memory.pieces(half, 0)
    with pytest.raises(MissingTensorError, match="all of it"):
        memory.take(half)
