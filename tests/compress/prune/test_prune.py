"""Pruned checkpoints: the original's bytes, bit for bit what the mask says, in every layout; and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.doctor.report import inspect
from exo_kimi.checkpoint.safetensors_io import StoredTensor
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.cli import main
from exo_kimi.compress.prune.config import pruned_config
from exo_kimi.compress.prune.mask import mask, mask_by_bias
from exo_kimi.compress.prune.plan import PrunePlan, everything, read_plan
from exo_kimi.compress.prune.prune import PruneWish, make_plan, write_pruned
from exo_kimi.errors import UsageError
from exo_kimi.runtime.loading.loader import load
from tests.compress.conftest import SHAPE, VARIANTS, Maker

TOKENS = mx.array([[5, 9, 100, 42, 7, 8, 10, 300, 301, 2, 3, 4, 11, 12, 600, 601, 77, 78, 1, 6]])


def _random(checkpoint: Checkpoint, seed: int, keep: int, **options: object) -> PrunePlan:
    return make_plan(checkpoint, PruneWish(keep=keep, criterion="random", seed=seed, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_pruned_is_the_files_themselves(variant: str, tiny: Maker, tmp_path: Path) -> None:
    directory = tiny(variant)
    (directory / "README.md").write_text("# as published\n", encoding="utf-8")
    checkpoint = Checkpoint(directory)
    write_pruned(checkpoint, everything(checkpoint.config), tmp_path / "out")
    for path in directory.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("seed", range(30))
def test_a_pruned_model_is_the_original_experts_behind_the_pruned_router(
    seed: int, tiny: Maker, tmp_path: Path
) -> None:
    """Bit for bit, over layouts, numbers of experts, and with a layer dropped in some."""
    directory = tiny(tuple(VARIANTS)[seed % len(VARIANTS)])
    checkpoint = Checkpoint(directory)
    keep = (8, 12, 8, 12, 8, 12)[seed // 5]
    plan = _random(checkpoint, seed, keep, drop_layers=(2,) if seed % 7 == 3 else ())
    write_pruned(checkpoint, plan, tmp_path / "out")
    masked = load(directory, dtype="float32")
    mask(masked, plan)
    pruned = load(tmp_path / "out", dtype="float32")
    assert mx.array_equal(masked(TOKENS), pruned(TOKENS)).item()
    assert pruned.args.n_routed_experts == keep
    assert len(pruned.layers) == 4 - len(plan.dropped_layers)
    assert not inspect(tmp_path / "out").problems


@pytest.mark.parametrize("variant", ["mlx", "groups"])
def test_a_bias_of_minus_infinity_is_the_same_choice(variant: str, tiny: Maker) -> None:
    checkpoint = Checkpoint(tiny(variant))
    plan = _random(checkpoint, 4, 8)
    masked, biased = (load(tiny(variant), dtype="float32") for _ in range(2))
    mask(masked, plan)
    mask_by_bias(biased, plan)
    one, other = masked(TOKENS), biased(TOKENS)
    assert mx.abs(one - other).max().item() < 1e-4
    assert mx.array_equal(one.argmax(-1), other.argmax(-1)).item()


def test_a_masked_model_decodes_as_it_prefills(tiny: Maker) -> None:
    """The router's fast way for single tokens gives original ids too."""
    checkpoint = Checkpoint(tiny("int4"))
    model = load(tiny("int4"), dtype="float32")
    mask(model, _random(checkpoint, 1, 8))
    whole = model(TOKENS)[0, -1]
    caches = model.make_cache()
    model.forward_ragged(TOKENS[0, :-1].astype(mx.int32), [(TOKENS.shape[1] - 1, caches)])
    model.fuse_projections()
    single = model.logits(model.forward_ragged(TOKENS[0, -1:].astype(mx.int32), [(1, caches)]))[0]
    assert mx.allclose(single, whole, rtol=1e-3, atol=1e-4).item()


def test_shared_experts_and_the_tower_are_carried_byte_for_byte(tiny: Maker, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny("bf16"))
    write_pruned(checkpoint, _random(checkpoint, 0, 8), tmp_path / "out")
    other = Checkpoint(tmp_path / "out")
    names = [name for name in checkpoint.index.tensors if "shared_experts" in name or "vision" in name]
    assert len(names) > 20
    for name in names:
        parts = [
            (each.directory / entry.file).read_bytes()[entry.start : entry.end]
            for each in (checkpoint, other)
            for entry in [each.index.tensors[name]]
        ]
        assert parts[0] == parts[1], name


def test_layers_that_guess_further_tokens_go_with_their_experts_and_both_card_and_command_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = {
        f"model.layers.4.{name}": StoredTensor("BF16", np.zeros((64, 64), np.uint16))
        for name in ("eh_proj.weight", "mlp.gate.weight", "mlp.experts.15.up_proj.weight")
    }
    directory = make_tiny(
        tmp_path / "in", layout="bf16", extra_tensors=extra, config={**SHAPE, "num_nextn_predict_layers": 1}
    )
    assert main(["prune", str(directory), str(tmp_path / "out"), "--by", "random"]) == 0
    assert "3 tensors of the layers that guess further tokens (MTP) are left out, 24.00 KiB" in capsys.readouterr().err
    other = Checkpoint(tmp_path / "out")
    assert not [name for name in other.index.tensors if ".layers.4." in name]
    assert other.raw_config["num_nextn_predict_layers"] == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "Left out: the 3 tensors of the layers that guess further tokens (MTP)." in card


def test_the_config_tells_the_truth() -> None:
    raw = {
        "model_type": "kimi_k25",
        "quantization": {
            "bits": 4,
            "group_size": 64,
            "language_model.model.layers.3.mlp.switch_mlp.up_proj": {"bits": 6},
        },
        "text_config": {
            "n_routed_experts": 4,
            "num_hidden_layers": 4,
            "num_experts_per_tok": 2,
            "routed_scaling_factor": 2.827,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "quantization_config": {
                "ignore": [
                    "lm_head",
                    "re:.*gate$",
                    "model.layers.1.mlp.experts.0.up_proj",
                    "model.layers.1.mlp.experts.3.up_proj",
                    "model.layers.2.self_attn.o_proj",
                ]
            },
        },
    }
    kept = dict.fromkeys((1, 2, 3), (1, 3))
    config = pruned_config(raw, PrunePlan(layers=4, experts=4, kept=kept, dropped_layers=(2,)))
    text = config["text_config"]
    assert (text["n_routed_experts"], text["num_hidden_layers"]) == (2, 3)
    assert (text["num_experts_per_tok"], text["routed_scaling_factor"]) == (2, 2.827)
    assert text["mlp_layer_types"] == ["dense", "sparse", "sparse"]
    assert text["quantization_config"]["ignore"] == ["lm_head", "re:.*gate$", "model.layers.1.mlp.experts.1.up_proj"]
    assert config["quantization"]["language_model.model.layers.2.mlp.switch_mlp.up_proj"] == {"bits": 6}
    assert "language_model.model.layers.3.mlp.switch_mlp.up_proj" not in config["quantization"]
    assert raw["text_config"]["n_routed_experts"] == 4  # type: ignore[index]


@pytest.mark.parametrize(
    ("variant", "keep", "words"),
    [("mlx", 3, "4 to 16"), ("mlx", 17, "4 to 16"), ("groups", 10, "multiple of n_group 4"), ("groups", 4, "8 to 16")],
)
def test_a_number_that_the_router_cannot_choose_from_is_refused(
    variant: str, keep: int, words: str, tiny: Maker
) -> None:
    with pytest.raises(UsageError) as error:
        _random(Checkpoint(tiny(variant)), 0, keep)
    assert words in str(error.value)


@pytest.mark.parametrize("layers", [(0,), (3,), (9,), (1, 3)])
def test_the_first_and_the_last_layer_stay(layers: tuple[int, ...], tiny: Maker) -> None:
    with pytest.raises(UsageError, match="cannot be dropped"):
        _random(Checkpoint(tiny("mlx")), 0, 16, drop_layers=layers)


def test_a_plan_is_written_read_and_held_to_its_hash(tiny: Maker, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny("mlx"))
    plan = _random(checkpoint, 3, 12)
    file = tmp_path / "plan.json"
    file.write_text(plan.to_json(), encoding="utf-8")
    assert read_plan(file) == plan
    edited = json.loads(file.read_text(encoding="utf-8"))
    edited["kept"]["1"][0] += 1
    file.write_text(json.dumps(edited), encoding="utf-8")
    with pytest.raises(UsageError, match="not a pruning plan"):
        read_plan(file)
    with pytest.raises(UsageError, match="another model"):
        replace(plan, experts=32).check(checkpoint.config)
