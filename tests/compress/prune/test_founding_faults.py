"""The founding documents cut K2 to 24 layers and 16 experts, called it K2-Mini, and got inf and nan. Each of five faults, put in.

Every test holds the pruned checkpoint to the original, and shows that the same check fails once the fault is in.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.compress.prune.mask import mask
from exo_kimi.compress.prune.plan import PrunePlan
from exo_kimi.compress.prune.prune import PruneWish, make_plan, write_pruned
from exo_kimi.errors import CheckpointError, CheckpointProblems
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.runtime.loading.loader import load
from tests.compress.conftest import SHAPE, Maker

TOKENS = mx.array([[5, 9, 100, 42, 7, 8, 10, 300, 301, 2, 3, 4, 11, 12, 600, 601, 77, 78, 1, 6]])


@pytest.fixture
def original(tiny: Maker) -> Checkpoint:
    return Checkpoint(tiny("int4"))


@pytest.fixture
def plan(original: Checkpoint) -> PrunePlan:
    return make_plan(original, PruneWish(keep=8, criterion="random", seed=5))


@pytest.fixture
def pruned(original: Checkpoint, plan: PrunePlan, tmp_path: Path) -> Path:
    write_pruned(original, plan, tmp_path / "out")
    return tmp_path / "out"


def _is_right(model: Model, original: Checkpoint, plan: PrunePlan) -> bool:
    """Whether it is the original behind the plan's routers, bit for bit."""
    oracle = load(original.directory, dtype="float32")
    mask(oracle, plan)
    return bool(mx.array_equal(model(TOKENS), oracle(TOKENS)).item())


def test_router_rows_cut_off_at_the_end_choose_other_experts(
    original: Checkpoint, plan: PrunePlan, pruned: Path
) -> None:
    model = load(pruned, dtype="float32")
    assert _is_right(model, original, plan)
    whole = load(original.directory, dtype="float32")
    for layer, other in zip(model.layers[1:], whole.layers[1:], strict=True):
        layer.mlp.gate.weight = other.mlp.gate.weight[: plan.keep]
        layer.mlp.gate.e_score_correction_bias = other.mlp.gate.e_score_correction_bias[: plan.keep]
    assert not _is_right(model, original, plan)


@pytest.mark.parametrize("fault", ["first rows", "none"])
def test_a_correction_bias_that_stays_behind_changes_the_choice(
    fault: str, original: Checkpoint, plan: PrunePlan, pruned: Path
) -> None:
    model = load(pruned, dtype="float32")
    assert _is_right(model, original, plan)
    whole = load(original.directory, dtype="float32")
    for layer, other in zip(model.layers[1:], whole.layers[1:], strict=True):
        bias = other.mlp.gate.e_score_correction_bias[: plan.keep]
        layer.mlp.gate.e_score_correction_bias = bias if fault == "first rows" else mx.zeros_like(bias)
    assert not _is_right(model, original, plan)


def test_layers_cut_without_new_numbers_are_no_model(original: Checkpoint, tmp_path: Path) -> None:
    """24 of 61 by number: those that stay keep their old numbers, or the config its old count."""
    plan = make_plan(original, PruneWish(keep=16, criterion="random", drop_layers=(2,)))
    write_pruned(original, plan, tmp_path / "out")
    assert _is_right(load(tmp_path / "out", dtype="float32"), original, plan)

    def old_count(raw: dict[str, object]) -> None:
        raw["num_hidden_layers"] = 4

    _edit_config(tmp_path / "out", old_count)
    with pytest.raises(CheckpointError):
        load(tmp_path / "out")
    gapped = make_tiny(tmp_path / "gapped", layout="int4", config=SHAPE)

    def fewer(raw: dict[str, object]) -> None:
        raw["num_hidden_layers"] = 3  # layer 3 is there, layer 2 is the one that was meant to go

    _edit_config(gapped, fewer)
    with pytest.raises(CheckpointError, match=r"model\.layers\.3"):
        load(gapped)


def test_a_config_that_says_something_else_is_refused_or_another_model(
    original: Checkpoint, plan: PrunePlan, pruned: Path
) -> None:
    """Experts counted as before do not load; a scaling factor of 1, as a default would have it, loads and answers otherwise."""
    assert _is_right(load(pruned, dtype="float32"), original, plan)
    before = (pruned / "config.json").read_text(encoding="utf-8")
    for key, value in (("n_routed_experts", 16), ("num_experts_per_tok", 9)):
        _edit_config(pruned, lambda raw, key=key, value=value: raw.update({key: value}))  # type: ignore[misc]
        with pytest.raises((CheckpointError, CheckpointProblems)):
            load(pruned)
        (pruned / "config.json").write_text(before, encoding="utf-8")
    for key, number in (("routed_scaling_factor", 1.0), ("num_experts_per_tok", 2)):
        _edit_config(pruned, lambda raw, key=key, number=number: raw.update({key: number}))  # type: ignore[misc]
        assert not _is_right(load(pruned, dtype="float32"), original, plan)
        (pruned / "config.json").write_text(before, encoding="utf-8")


def test_weights_that_went_through_fp16_are_infinite(tmp_path: Path) -> None:
    """FP8 codes times a block's factor, in float16: what is over 65,504 is inf, and inf - inf in a norm is nan. Copied bytes are
    what they were."""
    directory = make_tiny(tmp_path / "in", layout="fp8", config=SHAPE, shards=1)
    checkpoint = Checkpoint(directory)
    entry = checkpoint.index.tensors["model.layers.1.mlp.experts.0.up_proj.weight_scale_inv"]
    with (directory / entry.file).open("r+b") as stream:  # a large factor; the router never sees what it does to a loss
        stream.seek(entry.start)
        stream.write(np.full(entry.nbytes // 4, 1000.0, np.float32).tobytes())
    checkpoint = Checkpoint(directory)
    plan = PrunePlan(layers=4, experts=16, kept={layer: tuple(range(8)) for layer in (1, 2, 3)})
    write_pruned(checkpoint, plan, tmp_path / "out")
    model = load(tmp_path / "out", dtype="float32")
    assert _is_right(model, checkpoint, plan)
    assert mx.isfinite(model(TOKENS)).all().item()
    expert = model.layers[1].mlp.switch_mlp.up_proj
    narrow = np.array(expert.weight[0]).astype(ml_dtypes.bfloat16).astype(np.float16)
    assert not np.isfinite(narrow).all()
    weights = np.array(expert.weight)
    weights[0] = narrow
    expert.weight = mx.array(weights)
    outputs = model.layers[1].mlp.switch_mlp(mx.ones((1, SHAPE["hidden_size"])), mx.array([[0]], mx.uint32))
    assert not mx.isfinite(outputs).all().item()


def _edit_config(directory: Path, change: Callable[[dict[str, object]], object]) -> None:
    file = directory / "config.json"
    raw = json.loads(file.read_text(encoding="utf-8"))
    change(raw)
    file.write_text(json.dumps(raw), encoding="utf-8")
