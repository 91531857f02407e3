"""One vocabulary of recipes: what `plan` takes, `tiny` and `train requantize` take, and older names mean the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from exo_kimi import cli
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import UsageError
from exo_kimi.planner.weights.recipes import load_recipe, recipe_names


@pytest.mark.parametrize(
    ("former", "name"), [("mixed346", "q34+q6"), ("dq3", "dq3_k_m-q8"), ("plain", "bf16"), ("uniform3", "uniform-3")]
)
def test_an_older_name_is_the_same_checkpoint(former: str, name: str, tmp_path: Path) -> None:
    assert load_recipe(former).hash == load_recipe(name).hash
    older = make_tiny(tmp_path / "older", recipe=former, shards=1)
    for number, recipe in enumerate((name, load_recipe(name), load_recipe(former))):
        newer = make_tiny(tmp_path / f"newer{number}", recipe=recipe, shards=1)
        for file in ("config.json", "model.safetensors"):
            assert (newer / file).read_bytes() == (older / file).read_bytes()


AFFINE = [name for name in recipe_names() if all(rule.mode == "affine" for rule in load_recipe(name).rules)]


@pytest.mark.parametrize("name", [*AFFINE, "uniform-5"])
def test_tiny_follows_every_recipe_of_plan(name: str, tmp_path: Path) -> None:
    assert cli.main(["tiny", str(tmp_path / "kimi"), "--recipe", name]) == 0
    config = json.loads((tmp_path / "kimi" / "config.json").read_text())
    stated = config.get("quantization", {})
    bits = {entry["bits"] for entry in stated.values() if isinstance(entry, dict)} | {stated.get("bits")} - {None}
    wanted = {rule.bits for rule in load_recipe(name).rules if rule.bits < 16}
    layers_of_k2 = name == "dq3_k_m-q8"  # its rules name layers, and each of the tiny Kimi's own is among them
    assert wanted <= bits or layers_of_k2


def test_a_recipe_that_a_layout_cannot_follow_is_refused_by_its_name(tmp_path: Path) -> None:
    for layout in ("bf16", "int4", "fp8"):
        for name in ("q34+q6", "founding"):
            with pytest.raises(UsageError, match="cannot follow this recipe") as told:
                make_tiny(tmp_path / "kimi", layout=layout, recipe=load_recipe(name))  # type: ignore[arg-type]
            assert "mixed" not in str(told.value) and "plain" not in str(told.value)
