"""Bits by measurement: what choices cost, the knapsack against brute force, and against the fixed mixes on the tiny Kimi."""

from __future__ import annotations

import itertools
import json
import tomllib
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.quantization import QuantSpec
from exo_kimi.checkpoint.safetensors_io import StoredTensor, write_file
from exo_kimi.compress.convert.budget import choose, ranges, recipe_of, recipe_text
from exo_kimi.compress.convert.command import ConvertOptions, run_convert
from exo_kimi.compress.convert.importance import read_importance
from exo_kimi.compress.convert.measure import BitOption, ModuleErrors, measure
from exo_kimi.compress.convert.rows import SourceRows
from exo_kimi.compress.output.job import MANIFEST_NAME
from exo_kimi.compress.ranges import RangeReader
from exo_kimi.errors import UsageError
from exo_kimi.planner.weights.bytes import bytes_of_recipe
from exo_kimi.planner.weights.recipes import load_recipe, parse_recipe

Convert = Callable[..., Checkpoint]
TRAINED = Path(str(resources.files("exo_kimi"))) / "data" / "tiny-kimi-k2"


@st.composite
def knapsacks(draw: st.DrawFn) -> tuple[list[ModuleErrors], int]:
    modules = []
    for number in range(draw(st.integers(1, 5))):
        count = draw(st.integers(1, 4))
        sizes = sorted(draw(st.lists(st.integers(1, 900), min_size=count, max_size=count)))
        errors = draw(st.lists(st.floats(0, 1), min_size=count, max_size=count))
        options = tuple(
            BitOption(QuantSpec(bits + 2, 64), *pair) for bits, pair in enumerate(zip(sizes, errors, strict=True))
        )
        modules.append(ModuleErrors(f"m{number}", None, draw(st.floats(0.1, 2)), options))
    fewest = sum(module.options[0].nbytes for module in modules)
    return modules, draw(st.integers(fewest, fewest + 2000))


@given(knapsacks())
def test_the_choice_is_the_best_that_there_is(given_: tuple[list[ModuleErrors], int]) -> None:
    modules, budget = given_
    found = choose(modules, budget)
    every = [
        (sum(o.nbytes for o in ways), sum(m.worth * o.error**2 for m, o in zip(modules, ways, strict=True)))
        for ways in itertools.product(*(module.options for module in modules))
    ]
    best = min(error for nbytes, error in every if nbytes <= budget)
    assert found.nbytes <= budget
    assert found.error == pytest.approx(best, abs=1e-12)
    assert found.bound <= best + 1e-12


def test_many_modules_are_within_a_thousandth_of_the_bound() -> None:
    chance = np.random.default_rng(0)
    modules = []
    for number in range(731):
        size = int(chance.integers(10**6, 10**9))
        options = tuple(
            BitOption(
                QuantSpec(bits, 64), size * (2 * bits + 1) // 16, float(0.9 * 0.52**bits * chance.uniform(0.8, 1.2))
            )
            for bits in (2, 3, 4, 5, 6, 8)
        )
        modules.append(ModuleErrors(f"m{number}", None, 1.0, options))
    budget = sum(module.options[1].nbytes for module in modules) + 12_345_678
    found = choose(modules, budget)
    assert found.nbytes <= budget
    assert 0 <= found.gap < 0.001


def test_a_budget_below_the_fewest_bits_is_refused() -> None:
    module = ModuleErrors("m", None, 1.0, (BitOption(QuantSpec(2, 64), 100, 0.4),))
    with pytest.raises(UsageError, match="below the fewest bits"):
        choose([module], 99)


def test_layers_are_written_as_ranges() -> None:
    assert ranges([3, 1, 2, 7, 9, 10]) == ["1-3", "7", "9-10"]


def test_bits_that_a_module_has_already_cost_nothing(source_of: Callable[[str], Path]) -> None:
    found = {each.path: each for each in measure(Checkpoint(source_of("int4")))}
    experts = {o.packing: o.error for o in found["model.layers.1.mlp.switch_mlp.up_proj"].options}
    assert experts[QuantSpec(4, 32)] == 0
    assert 0.1 < experts[QuantSpec(3, 64)] < 0.25
    assert experts[QuantSpec(8, 64)] < experts[QuantSpec(6, 64)] < experts[QuantSpec(5, 64)]
    halves = {each.path for each in measure(Checkpoint(source_of("mlx 5, absorbed")))}
    assert "model.layers.0.self_attn.kv_b_proj" in halves
    assert not [path for path in halves if path.endswith("embed_q")]


def test_a_recipe_of_a_budget_has_the_bits_and_bytes_of_the_choice(
    source_of: Callable[[str], Path], converted: Convert, tmp_path: Path
) -> None:
    source = Checkpoint(source_of("bf16"))
    modules = measure(source)
    budget = 330_000
    choice = choose(modules, budget)
    text = recipe_text(choice, name="mine", budget_bytes=budget)
    recipe = recipe_of(text)
    assert parse_recipe(tomllib.loads(text), where="test").hash == recipe.hash
    output = converted(source.directory, tmp_path / "out", recipe)
    by_path = {s.spec.path: s.quant for s in output.manifest().sources}
    for path, option in choice.options.items():
        for written in (path, path.replace("kv_b_proj", "embed_q"), path.replace("kv_b_proj", "unembed_out")):
            assert by_path.get(written, option.packing) == option.packing
    packed = sum(s.disk_bytes for s in output.manifest().sources if s.spec.quantizable)
    assert packed == choice.nbytes <= budget
    assert bytes_of_recipe(source.config, recipe, name="x").total_bytes == output.manifest().disk_bytes


@pytest.mark.parametrize("name", ["uniform-3", "founding", "q34+q6", "uniform-4"])
def test_a_choice_has_less_error_than_the_fixed_mix_of_its_bytes(name: str, modules: tuple[ModuleErrors, ...]) -> None:
    """Of the trained tiny Kimi, by what is minimised; docs/convert.md has the divergence, which a few tokens decide."""
    source, recipe = Checkpoint(TRAINED), load_recipe(name)
    specs = {s.spec.path: s.spec for s in source.manifest().sources}
    budget = sum(recipe.weight_bytes(specs[module.path]) for module in modules)
    options = [{option.packing: option.error for option in module.options} for module in modules]
    fixed = [each[recipe.packing(specs[module.path])] for module, each in zip(modules, options, strict=True)]
    choice = choose(modules, budget)
    assert choice.nbytes <= budget
    assert choice.error < 0.9 * sum(m.worth * e**2 for m, e in zip(modules, fixed, strict=True))


@pytest.fixture(scope="module")
def modules() -> tuple[ModuleErrors, ...]:
    return measure(Checkpoint(TRAINED))


def test_columns_that_matter_are_weighed(source_of: Callable[[str], Path], tmp_path: Path) -> None:
    source = Checkpoint(source_of("bf16"))
    path = "model.layers.1.mlp.switch_mlp.up_proj"
    values = np.ones((4, 128), np.float32)
    values[:, :4] = 1e4
    write_file(tmp_path / "inputs.safetensors", {path: StoredTensor("F32", values)})
    importance = read_importance(tmp_path / "inputs.safetensors", source)
    plain = {each.path: each for each in measure(source)}
    weighed = {each.path: each for each in measure(source, importance=importance)}
    assert weighed["lm_head"] == plain["lm_head"]
    one, other = (found[path].options[0].error for found in (plain, weighed))
    assert other < 0.8 * one


def test_a_calibration_weighs_what_is_written_as_it_was_measured(
    source_of: Callable[[str], Path], converted: Convert, tmp_path: Path
) -> None:
    """By the columns' weights the error of the files is what `--measure` said, and less than without; experts apart."""
    source, path = Checkpoint(source_of("bf16")), "model.layers.1.mlp.switch_mlp.up_proj"
    values = np.ones((4, 128), np.float32)
    for expert in range(4):
        values[expert, expert::4] = 1e4
    importance = {path: values}
    told = {o.packing: o.error for m in measure(source, importance=importance) if m.path == path for o in m.options}
    errors = []
    for name, given_ in (("weighed", importance), ("plain", None)):
        output = converted(source.directory, tmp_path / name, "uniform-3", importance=given_)
        errors.append(_weighed_error(source, output, path, values))
    assert errors[0] == pytest.approx(told[QuantSpec(3, 64)], rel=1e-3)
    assert errors[0] < 0.9 * errors[1]
    manifests = [json.loads((tmp_path / name / MANIFEST_NAME).read_text()) for name in ("weighed", "plain")]
    assert manifests[0]["job"] != manifests[1]["job"]


def _weighed_error(source: Checkpoint, output: Checkpoint, path: str, columns: np.ndarray) -> float:
    squared = total = 0.0
    with RangeReader(source.directory) as old, RangeReader(output.directory) as new:
        one, other = (
            SourceRows(reader, next(s for s in each.manifest().sources if s.spec.path == path))
            for reader, each in ((old, source), (new, output))
        )
        for matrix in range(one.matrices):
            wanted, found = (rows.floats(matrix, 0, rows.out) for rows in (one, other))
            squared += float((np.square(found - wanted) @ columns[matrix]).sum())
            total += float((np.square(wanted) @ columns[matrix]).sum())
    return float(np.sqrt(squared / total))


@pytest.mark.parametrize(
    ("name", "values", "what"),
    [
        ("model.layers.9.mlp.gate_proj", np.ones(128, np.float32), "another model"),
        ("lm_head", np.ones(5, np.float32), "another model"),
        ("lm_head", np.zeros(128, np.float32), "no mean squares"),
        ("lm_head", np.full(128, np.nan, np.float32), "no mean squares"),
    ],
)
def test_a_calibration_of_another_model_is_refused(
    name: str, values: np.ndarray, what: str, source_of: Callable[[str], Path], tmp_path: Path
) -> None:
    write_file(tmp_path / "inputs.safetensors", {name: StoredTensor("F32", values)})
    with pytest.raises(UsageError, match=what):
        read_importance(tmp_path / "inputs.safetensors", Checkpoint(source_of("bf16")))
    with pytest.raises(UsageError, match="cannot read"):
        read_importance(tmp_path / "nothing.safetensors", Checkpoint(source_of("bf16")))


def test_measuring_and_choosing_from_the_command_line(source_of: Callable[[str], Path], tmp_path: Path) -> None:
    source, recipe = source_of("bf16"), tmp_path / "r.toml"
    table = run_convert(ConvertOptions(directory=source, output=None, recipe=None, measure=True))
    assert "model.layers.1.mlp.switch_mlp.down_proj" in table and "3/64" in table
    told = run_convert(
        ConvertOptions(directory=source, output=None, recipe=None, budget_bytes=400_000, recipe_out=recipe)
    )
    assert str(recipe) in told
    assert bytes_of_recipe(Checkpoint(source).config, load_recipe(recipe), name="x").total_bytes <= 400_000
    run_convert(ConvertOptions(directory=source, output=tmp_path / "out", recipe=None, budget_bytes=400_000))
    assert Checkpoint(tmp_path / "out").manifest().disk_bytes <= 400_000


@pytest.mark.parametrize(
    "options",
    [
        {"recipe": load_recipe("q34+q6"), "measure": True},
        {"link": True, "budget_bytes": 10**9},
        {"recipe": load_recipe("q34+q6"), "recipe_out": Path("x.toml")},
        {"recipe": load_recipe("q34+q6"), "calibration": Path("x"), "rounding": "mlx"},
        {},
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict, source_of: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError):
        run_convert(
            ConvertOptions(directory=source_of("bf16"), **{"output": Path("nowhere"), "recipe": None, **options})
        )
