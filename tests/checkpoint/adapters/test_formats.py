"""Adapters on disk: mlx-lm's and PEFT's formats say the same, and what is not for this model is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exo_kimi.checkpoint.adapters.manifest import resolve_adapter
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.safetensors_io import StoredTensor, write_file
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import ExoKimiError
from tests.runtime.adapters import KV_B, write_random
from tests.train.lora.conftest import SHAPE


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("formats") / "base", layout="bf16", config=SHAPE, shards=1)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_both_formats_hold_the_same_adapter(base: Path, tmp_path: Path, kind: Any) -> None:
    found = []
    for written_as in ("mlx", "peft"):
        path = write_random(tmp_path / written_as, base, seed=1, kind=kind, written_as=written_as)  # type: ignore[arg-type]
        found.append(resolve_adapter(path, Checkpoint(base)).read())
    assert found[0].keys() == found[1].keys() and len(found[0]) == 11
    for path, one in found[0].items():
        other = found[1][path]
        assert np.array_equal(one.lora_a, other.lora_a) and np.array_equal(one.lora_b, other.lora_b)
        assert one.scale == pytest.approx(other.scale)
        assert (one.magnitude is None) == (other.magnitude is None) == (kind == "lora")


def test_peft_s_scale_is_alpha_over_the_rank_or_its_root_and_ranks_may_differ(base: Path, tmp_path: Path) -> None:
    path = write_random(tmp_path / "peft", base, seed=1, written_as="peft", rank=4)
    edit(path, lambda raw: raw | {"use_rslora": True, "lora_alpha": 6, "r": 9})
    assert {own.scale for own in resolve_adapter(path, Checkpoint(base)).read().values()} == {3.0}


def edit(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


@pytest.mark.parametrize(
    ("written_as", "change", "told"),
    [
        ("mlx", {"fine_tune_type": "full"}, "fine_tune_type"),
        ("mlx", {"lora_parameters": {"rank": 4}}, "lora_parameters.scale"),
        ("mlx", {"lora_parameters": {"rank": 0, "scale": 1}}, "lora_parameters.rank"),
        ("mlx", {"exo_kimi": {"base_name": "other", "base_fingerprint": "f" * 64}}, "another model"),
        ("mlx", {"fine_tune_type": "dora"}, "no m"),
        ("peft", {"peft_type": "IA3"}, "peft_type"),
        ("peft", {"bias": "all"}, "bias"),
        ("peft", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("peft", {"alpha_pattern": {"o_proj": 3}}, "alpha_pattern"),
        ("peft", {"lora_alpha": None}, "lora_alpha"),
    ],
)
def test_a_config_that_asks_for_other_maths_is_refused_by_name(
    base: Path, tmp_path: Path, written_as: Any, change: dict[str, Any], told: str
) -> None:
    path = write_random(tmp_path / "adapter", base, seed=1, written_as=written_as)
    edit(path, lambda raw: raw | change)
    with pytest.raises(ExoKimiError, match=told):
        resolve_adapter(path, Checkpoint(base))


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [
        ("model.layers.0.self_attn.w_proj.lora_a", (64, 4), "does not have"),
        ("model.layers.7.self_attn.o_proj.lora_a", (64, 4), "does not have"),
        ("model.layers.1.mlp.gate.lora_a", (64, 4), "routers take no adapter"),
        ("model.layers.1.mlp.switch_mlp.gate_proj.lora_a", (4, 4, 64), "routed experts take no adapter"),
        ("lm_head.lora_a", (64, 4), "only the linear projections"),
        ("model.layers.0.self_attn.o_proj.lora_a", (63, 4), "o_proj.lora_a"),
        ("model.layers.0.self_attn.o_proj.weight", (64, 64), "o_proj.weight"),
        ("model.layers.0.self_attn.kv_b_proj.lora_a", (64, 4), "kv_b_proj: no lora_b"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    base: Path, tmp_path: Path, name: str, shape: tuple[int, ...], told: str
) -> None:
    from safetensors.numpy import load_file

    path = write_random(tmp_path / "adapter", base, seed=1)
    file = path / "adapters.safetensors"
    tensors = {key: StoredTensor("F32", value) for key, value in load_file(file).items()}
    write_file(file, {**tensors, name: StoredTensor("F32", np.zeros(shape, np.float32))})
    with pytest.raises(ExoKimiError, match=told):
        resolve_adapter(path, Checkpoint(base))


def test_numbers_that_are_not_finite_and_files_that_are_cut_are_refused(base: Path, tmp_path: Path) -> None:
    path = write_random(tmp_path / "adapter", base, seed=1)
    file = path / "adapters.safetensors"
    data = bytearray(file.read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    file.write_bytes(data)
    with pytest.raises(ExoKimiError, match="not finite"):
        resolve_adapter(path, Checkpoint(base)).read()
    file.write_bytes(data[:-100])
    with pytest.raises(ExoKimiError, match=r"adapters\.safetensors"):
        resolve_adapter(path, Checkpoint(base))


def test_an_adapter_of_kv_b_is_not_for_a_checkpoint_that_holds_its_halves(base: Path, tmp_path: Path) -> None:
    path = write_random(tmp_path / "adapter", base, seed=1, keys=(KV_B,))
    halves = make_tiny(tmp_path / "halves", layout="mlx", absorbed=True, config=SHAPE, group_size=32)
    with pytest.raises(ExoKimiError, match="holds in another form"):
        resolve_adapter(path, Checkpoint(halves))


def test_a_nested_model_s_names_have_its_prefix_and_the_same_base_in_other_bits_is_the_base(tmp_path: Path) -> None:
    nested = make_tiny(tmp_path / "nested", layout="bf16", prefix=True, config=SHAPE, shards=1)
    path = write_random(tmp_path / "adapter", nested, seed=1)
    from safetensors.numpy import load_file

    assert all(name.startswith("language_model.model.layers.") for name in load_file(path / "adapters.safetensors"))
    packed = make_tiny(tmp_path / "packed", layout="mlx", prefix=True, config=SHAPE, group_size=32)
    assert len(resolve_adapter(path, Checkpoint(packed)).modules) == 11
    other = make_tiny(tmp_path / "other", layout="bf16", prefix=True, config=SHAPE, seed=9)
    with pytest.raises(ExoKimiError, match="another model"):
        resolve_adapter(path, Checkpoint(other))
