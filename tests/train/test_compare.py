"""Two optimizers on one budget: the same texts for both, the best rate of each, and when one stands where the other ends."""

from __future__ import annotations

from dataclasses import replace

import pytest

from exo_kimi.cli import main
from exo_kimi.compress.texts.encoding import Encoder
from exo_kimi.train.compare import Comparison, ComparisonRun, compare_with
from tests.train.conftest import RECIPE


def _run(matrices: str, rate: float, *losses: float) -> ComparisonRun:
    return ComparisonRun(matrices=matrices, rate=rate, seed=0, losses=losses, seconds=1.0)


def test_the_best_rates_and_the_step_of_the_crossing() -> None:
    falling = [5.0 - step * 0.4 for step in range(10)]
    quick = [5.0 - step * 0.5 for step in range(10)]
    runs = (
        _run("adamw", 0.1, *falling),
        _run("muon", 0.1, *quick),
        _run("adamw", 0.2, *[6.0] * 10),
        _run("muon", 0.2, *[7.0] * 10),
    )
    comparison = Comparison(steps=10, group_tokens=1, runs=runs)
    assert (comparison.best_rate("adamw"), comparison.best_rate("muon")) == (0.1, 0.1)
    assert comparison.steps_to_match() == 9  # 5 - 8 * 0.5 is the first at or under 5 - 9 * 0.4
    assert "after 9 of 10 steps" in comparison.to_text()
    slow = Comparison(steps=10, group_tokens=1, runs=(runs[1], replace(runs[1], matrices="adamw", losses=(0.0,) * 10)))
    assert slow.steps_to_match() is None


def test_both_begin_alike_and_read_the_same_texts(encoder: Encoder) -> None:
    recipe = replace(RECIPE, steps=3, aware_share=0.0)
    comparison = compare_with(encoder, recipe, (0.005,), (0,))
    adamw, muon = comparison.runs
    assert (adamw.matrices, muon.matrices) == ("adamw", "muon")
    assert adamw.losses[0] == muon.losses[0]
    assert adamw.losses[1:] != muon.losses[1:]


def test_a_rate_that_is_none_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "compare", "--rates", "0.1,fast"]) == 2
    assert "'fast' is not a learning rate between 0 and 1" in capsys.readouterr().err
