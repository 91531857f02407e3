"""Kimi Linear's checkpoints: every published layout is read, and what is wrong with one has a name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.doctor.report import inspect, render
from exo_kimi.checkpoint.safetensors_io import StoredTensor
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import CheckpointProblems, UnsupportedModelError, UsageError

LAYOUTS: list[dict[str, Any]] = [
    {"layout": "bf16"},
    {"layout": "mlx", "recipe": "uniform4"},
    {"layout": "mlx", "recipe": "mixed346", "absorbed": True},
    {"layout": "mlx", "recipe": "plain"},
    {"layout": "int4"},
    {"layout": "fp8"},
]


@pytest.mark.parametrize("options", LAYOUTS, ids=lambda options: "-".join(map(str, options.values())))
def test_every_layout_resolves_and_is_inspected(tmp_path: Path, options: dict[str, Any]) -> None:
    directory = make_tiny(tmp_path / "tiny", family="linear", **options)
    manifest = Checkpoint(directory).manifest()
    assert not [note for note in manifest.notes if "skipped" not in note]
    text = render(inspect(directory))
    assert "no problems" in text and "Kimi Delta Attention (0-2, 4-5)" in text
    assert sum(source.disk_bytes for source in manifest.sources) == manifest.disk_bytes


def test_published_names_and_shapes_are_those_of_the_hub(tmp_path: Path) -> None:
    index = Checkpoint(make_tiny(tmp_path / "tiny", family="linear", layout="bf16", config={"num_experts": 8})).index
    shapes = {
        entry.name: entry.shape
        for parts in index.modules.values()
        for part in parts.values()
        for entry in part.values()
    }
    assert shapes["model.layers.1.block_sparse_moe.experts.7.w2.weight"] == (256, 128)
    assert shapes["model.layers.1.block_sparse_moe.gate.e_score_correction_bias"] == (8,)
    assert shapes["model.layers.1.block_sparse_moe.shared_experts.up_proj.weight"] == (128, 256)
    assert shapes["model.layers.0.mlp.gate_proj.weight"] == (512, 256)
    assert shapes["model.layers.0.self_attn.q_conv1d.weight"] == (256, 1, 4)
    assert shapes["model.layers.0.self_attn.A_log"] == (1, 1, 4, 1)
    assert shapes["model.layers.0.self_attn.dt_bias"] == (256,)


def test_mlx_names_are_those_of_mlx_lm(tmp_path: Path) -> None:
    index = Checkpoint(make_tiny(tmp_path / "tiny", family="linear", recipe="uniform4")).index
    names = {entry.name for parts in index.modules.values() for part in parts.values() for entry in part.values()}
    assert {"model.layers.1.mlp.e_score_correction_bias", "model.layers.1.mlp.gate.scales"} <= names
    assert {"model.layers.0.self_attn.q_conv.conv.weight", "model.layers.1.mlp.switch_mlp.up_proj.weight"} <= names


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("model.layers.0.self_attn.A_log", (1, 1, 8, 1), "fits no reading"),
        ("model.layers.0.self_attn.dt_bias", (64,), "fits no reading"),
        ("model.layers.0.self_attn.k_conv1d.weight", (256, 1, 3), "fits no reading"),
        ("model.layers.3.self_attn.k_proj.weight", (256, 256), "describes no such module"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path: Path, name: str, shape: tuple[int, ...], words: str) -> None:
    extra = {name: StoredTensor("F32", np.zeros(shape, np.float32))}
    directory = make_tiny(tmp_path / "tiny", family="linear", layout="bf16", extra_tensors=extra)
    with pytest.raises(CheckpointProblems, match=words) as caught:
        Checkpoint(directory).manifest()
    assert name in str(caught.value)


def test_a_packed_router_is_legal_here_and_not_in_k2(tmp_path: Path) -> None:
    manifest = Checkpoint(make_tiny(tmp_path / "tiny", family="linear", recipe="uniform4")).manifest()
    routers = [source for source in manifest.sources if source.spec.kind == "router"]
    assert {(source.quant.bits, source.quant.group_size) for source in routers if source.quant} == {(8, 64)}
    held = 16 * 256 + 2 * 2 * 16 * 256 // 64  # codes, scales and biases
    assert {source.widened_bytes for source in routers} == {4 * 16 * 256 - held}
    assert not any(source.spec.packs for source in Checkpoint(make_tiny(tmp_path / "k2")).manifest().sources)


def test_a_kimi_k3_as_published_is_inspected_and_not_run(tmp_path: Path) -> None:
    from exo_kimi.checkpoint.doctor.doctor import doctor
    from exo_kimi.runtime.loading.loader import load

    directory = make_tiny(tmp_path / "tiny", family="k3", layout="mxfp4")
    checkpoint = Checkpoint(directory)
    shapes = {
        entry.name.removeprefix("language_model."): (entry.shape, entry.dtype)
        for parts in checkpoint.index.modules.values()
        for part in parts.values()
        for entry in part.values()
    }
    assert shapes["model.layers.0.self_attn.A_log"] == ((4,), "F32")  # of 3 heads
    assert shapes["model.layers.3.self_attn.g_proj.weight"] == ((192, 256), "BF16")
    assert shapes["model.layers.0.self_attn.g_proj.weight"] == ((192, 256), "BF16")
    assert shapes["model.layers.1.mlp_res_proj.weight"] == ((1, 256), "BF16")
    # Two codes a byte, four bytes a word: bytes (128, 64) on disk.
    assert shapes["model.layers.1.block_sparse_moe.experts.0.w1.weight_packed"] == ((128, 16), "U32")
    text = render(inspect(directory))
    assert "no problems" in text and "kimi_linear in kimi_k3" in text and "mxfp4" in text
    assert not doctor(directory).findings
    with pytest.raises(UnsupportedModelError, match="Kimi K3 is not run yet"):
        load(directory)


def test_packed_mxfp4_is_what_mlx_reads() -> None:
    import mlx.core as mx

    from exo_kimi.checkpoint.packing import quantize_mxfp4

    weight = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    codes, exponents = quantize_mxfp4(weight)
    found = mx.dequantize(mx.array(codes).view(mx.uint32), mx.array(exponents), group_size=32, bits=4, mode="mxfp4")
    peak = np.abs(weight.reshape(4, 2, 32)).max(-1, keepdims=True)
    error = np.abs(np.array(found.astype(mx.float32)).reshape(4, 2, 32) - weight.reshape(4, 2, 32))
    assert (error <= peak / 4).all()


def test_a_kimi_linear_is_not_nested(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not nested"):
        make_tiny(tmp_path / "tiny", family="linear", prefix=True)
