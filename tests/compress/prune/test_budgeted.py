"""Layers with different numbers of experts: written, counted and served as the mask says, and refused where one number rules."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from exo_kimi.arch.config import KimiConfig
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.doctor.report import inspect, render
from exo_kimi.cli import main
from exo_kimi.compress.prune.mask import mask
from exo_kimi.compress.prune.plan import PrunePlan, everything
from exo_kimi.compress.prune.prune import write_pruned
from exo_kimi.errors import ConfigError
from exo_kimi.experts.budget import ExpertCache
from exo_kimi.experts.layout import layouts_of
from exo_kimi.models.kimi_k2 import CACHE_STEP, Model
from exo_kimi.planner.weights.bytes import bytes_of_manifest
from exo_kimi.planner.weights.measured import pruned_bytes
from exo_kimi.runtime.engine.engine import Engine
from exo_kimi.runtime.loading.loader import load, load_stage
from exo_kimi.runtime.requests import GenerationRequest, SamplingParams
from exo_kimi.runtime.stage.inline import InlinePipeline
from tests.compress.conftest import VARIANTS, Maker
from tests.compress.prune.test_prune import TOKENS

COUNTS = {1: 12, 2: 6, 3: 16}


def random_plan(checkpoint: Checkpoint, seed: int, **options: Any) -> PrunePlan:
    """A plan with other numbers of experts in each layer, as many in each group."""
    config, rng = checkpoint.config, np.random.default_rng(seed)
    full, per_group = everything(config), config.n_routed_experts // config.n_group
    kept = {}
    for layer, ids in full.kept.items():
        least = -(-config.num_experts_per_tok // config.topk_group)
        each = int(rng.integers(least, per_group + 1))
        chosen = [rng.choice(per_group, each, replace=False) + group * per_group for group in range(config.n_group)]
        kept[layer] = tuple(sorted(int(expert) for part in chosen for expert in part))
        assert set(kept[layer]) <= set(ids)
    return replace(full, kept=kept, **options)


@pytest.fixture(scope="module")
def uneven(tiny: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12, 6 and 16 of 16 experts, official INT4."""
    checkpoint, out = Checkpoint(tiny("int4")), tmp_path_factory.mktemp("uneven") / "out"
    kept = {layer: tuple(range(16 - count, 16)) for layer, count in COUNTS.items()}
    write_pruned(checkpoint, replace(everything(checkpoint.config), kept=kept), out)
    return out


@pytest.mark.parametrize("seed", range(12))
def test_a_budgeted_model_is_the_original_experts_behind_the_pruned_router(
    seed: int, tiny: Maker, tmp_path: Path
) -> None:
    """Bit for bit, over layouts, and with a layer dropped in some; the planner counts the same bytes before and after."""
    directory = tiny(tuple(VARIANTS)[seed % len(VARIANTS)])
    checkpoint = Checkpoint(directory)
    plan = random_plan(checkpoint, seed, dropped_layers=(2,) if seed % 5 == 3 else ())
    write_pruned(checkpoint, plan, tmp_path / "out")
    masked, pruned = load(directory, dtype="float32"), load(tmp_path / "out", dtype="float32")
    mask(masked, plan)
    assert mx.array_equal(masked(TOKENS), pruned(TOKENS)).item()
    other = Checkpoint(tmp_path / "out")
    assert tuple(map(other.config.routed_experts, range(len(plan.counts)))) == plan.counts
    keep = {layer: len(ids) for layer, ids in plan.kept.items()}
    expected = bytes_of_manifest(other.manifest())
    found = pruned_bytes(bytes_of_manifest(checkpoint.manifest()), keep, plan.dropped_layers)
    for name in (
        "layer_bytes",
        "expert_bytes",
        "expert_disk_bytes",
        "widened_bytes",
        "total_bytes",
        "expert_slot_bytes",
    ):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.config == other.config
    held = sum(each.nbytes for _, each in mlx_parameters(load(tmp_path / "out")))
    assert held == expected.total_bytes - expected.vision_bytes


def mlx_parameters(model: Model) -> list[tuple[str, mx.array]]:
    return tree_flatten(model.parameters())


async def _tokens(models: list[Model]) -> list[int]:
    pipeline = InlinePipeline(
        lambda: models, stages=len(models), context=4096, kv_capacity_tokens=20 * CACHE_STEP, cache_step=CACHE_STEP
    )
    engine = Engine(pipeline)
    await engine.start()
    try:
        request = GenerationRequest(
            request_id="r",
            prompt_ids=tuple(TOKENS[0].tolist()),
            max_tokens=12,
            sampling=SamplingParams(temperature=0.0),
        )
        return [event.token_id async for event in engine.generate(request)]
    finally:
        await engine.close()


@pytest.mark.parametrize("bounds", [(0, 4), (0, 2, 4), (0, 1, 2, 4)])
def test_it_is_served_by_one_stage_and_by_several_with_the_same_tokens(bounds: tuple[int, ...], uneven: Path) -> None:
    whole, ids = load(uneven, dtype="float32"), TOKENS[0].tolist()
    for _ in range(12):
        ids.append(int(whole(mx.array([ids]))[0, -1].argmax().item()))
    found = asyncio.run(_tokens([load(uneven, a, b, dtype="float32", fuse=True) for a, b in pairwise(bounds)]))
    assert found == ids[TOKENS.shape[1] :]


def test_its_experts_are_read_from_disk_where_few_have_a_slot(uneven: Path) -> None:
    """A layer gets no more slots than it has experts, and the others get what that leaves."""
    manifest = Checkpoint(uneven).manifest()
    each = layouts_of(manifest.sources, floats="F32")[1].slot_bytes
    cache = ExpertCache(budget_bytes=30 * each, prefetch="off")
    model = load_stage(manifest, dtype="float32", expert_cache=cache)
    rows = [layer.mlp.switch_mlp.up_proj.weight.shape[0] for layer in model.layers[1:]]
    assert rows == [12, 6, 12]
    assert mx.array_equal(model(TOKENS), load(uneven, dtype="float32")(TOKENS)).item()


def test_inspect_names_the_counts_and_the_doctor_who_cannot_read_them(
    uneven: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = inspect(uneven)
    assert report.ok
    assert "experts  6 to 16 (11.33 on the average), 4 a token" in render(report)
    assert main(["doctor", str(uneven)]) == 0
    said = capsys.readouterr().out
    assert "layers have different numbers of experts, which exo-kimi alone reads" in said
    assert "n_routed_experts_per_layer, 6 to 16" in said


def test_plan_counts_it_to_the_byte(uneven: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert main(["plan", str(uneven), "--cluster", "m4-max-64", "-o", str(file), "--context", "4096"]) == 0
    weights = json.loads(file.read_text(encoding="utf-8"))["stages"][0]["weight_bytes"]
    model = load(uneven, fuse=True)
    assert weights == sum(each.nbytes for _, each in mlx_parameters(model))


def test_from_scores_to_a_served_budget(tiny: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands of a user: calibrate, prune by the budget, convert what came of it."""
    directory, text = tiny("bf16"), tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 8, encoding="utf-8")
    scores, out, four = tmp_path / "scores.json", tmp_path / "out", tmp_path / "four"
    assert main(["calibrate", str(directory), "--text", str(text), "-o", str(scores), "--dtype", "float32"]) == 0
    assert main(["prune", str(directory), str(out), "--scores", str(scores), "--keep", "12", "--budgeted"]) == 0
    assert "mlx-lm and exo's own engine do not" in capsys.readouterr().err
    config = Checkpoint(out).config
    counts = config.n_routed_experts_per_layer
    assert counts is not None and sum(counts) == 36 and counts[0] == 0
    assert "n_routed_experts_per_layer" in (out / "README.md").read_text(encoding="utf-8")
    assert main(["prune", str(out), str(tmp_path / "again"), "--by", "random"]) == 2
    assert "is not pruned again" in capsys.readouterr().err
    assert main(["convert", str(out), str(four), "--recipe", "uniform-4"]) == 0
    assert Checkpoint(four).config.n_routed_experts_per_layer == counts
    assert inspect(four).ok


def test_a_layer_with_less_to_lose_keeps_fewer_and_protected_ones_stay(tiny: Maker) -> None:
    from exo_kimi.compress.prune.choose import keep_budgeted

    worth = {1: np.linspace(10, 20, 16), 2: np.concatenate([[0.0], np.linspace(1, 2, 15)])}
    kept = keep_budgeted(worth, 10, least=4, protected={2: (0,)})
    assert {layer: len(ids) for layer, ids in kept.items()} == {1: 16, 2: 4}
    assert kept[2] == (0, 13, 14, 15)
    kept = keep_budgeted(worth, 10, least=4, protected={2: tuple(range(7))})
    assert {layer: len(ids) for layer, ids in kept.items()} == {1: 13, 2: 7}


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ([0, 12, 6], "4 whole numbers"),
        ([0, 12, 6, 12], "the largest n_routed_experts 16"),
        ([0, 12, 3, 16], "3 in layer 2"),
        ([2, 12, 6, 16], "2 in layer 0"),
        ([0, 12, "6", 16], "4 whole numbers"),
        ({"1": 12}, "4 whole numbers"),
    ],
)
def test_counts_that_cannot_be_are_refused(counts: Any, words: str, uneven: Path) -> None:
    raw = {**json.loads((uneven / "config.json").read_text(encoding="utf-8")), "n_routed_experts_per_layer": counts}
    with pytest.raises(ConfigError) as error:
        KimiConfig.from_dict(raw)
    assert words in str(error.value)


def test_a_list_of_one_number_is_that_number(uneven: Path) -> None:
    raw = json.loads((uneven / "config.json").read_text(encoding="utf-8"))
    assert KimiConfig.from_dict({**raw, "n_routed_experts_per_layer": [0, 16, 16, 16]}).is_even


@pytest.mark.parametrize("variant", ["mlx", "int4"])
def test_mlx_lm_does_not_load_it(variant: str, tiny: Maker, tmp_path: Path) -> None:
    """By its own checks: experts that are missing, or shapes that are not those of n_routed_experts."""
    checkpoint = Checkpoint(tiny(variant))
    write_pruned(checkpoint, random_plan(checkpoint, 3), tmp_path / "out")
    with pytest.raises((ValueError, KeyError), match=r"shape|experts"):
        load_model(tmp_path / "out")
