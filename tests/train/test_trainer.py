"""A training of seconds: the loss falls, a resumed run is the same run, the same seed gives the same file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from exo_kimi.compress.texts.encoding import Encoder
from exo_kimi.errors import UsageError
from exo_kimi.train import command
from exo_kimi.train.command import train_tiny
from exo_kimi.train.export import read_parameters
from exo_kimi.train.model.parameters import BIAS
from exo_kimi.train.recipe import TrainingRecipe
from exo_kimi.train.trainer import Trainer, TrainingProgress
from tests.train.conftest import RECIPE


def _trained(encoder: Encoder, recipe: TrainingRecipe, until: int) -> Trainer:
    trainer = Trainer(recipe, encoder)
    trainer.run(lambda _: None, until=until)
    return trainer


def test_the_loss_falls_and_experts_are_balanced(encoder: Encoder) -> None:
    seen: list[TrainingProgress] = []
    trainer = Trainer(RECIPE, encoder)
    trainer.run(seen.append)
    assert [step.step for step in seen] == list(range(1, RECIPE.steps + 1))
    assert np.mean(trainer.losses[-3:]) < 0.7 * trainer.losses[0]
    assert seen[-1].rate < seen[10].rate
    assert np.abs(trainer.parameters[f"model.layers.1.mlp.gate.{BIAS}"]).max() > 0


def test_a_resumed_training_is_the_training(encoder: Encoder, tmp_path: Path) -> None:
    recipe = replace(RECIPE, steps=6)
    whole = _trained(encoder, recipe, 6)
    half = _trained(encoder, recipe, 3)
    half.save(tmp_path / "state.npz")
    rest = Trainer(recipe, encoder)
    rest.resume(tmp_path / "state.npz")
    rest.run(lambda _: None)
    assert rest.losses == whole.losses
    for name, value in whole.parameters.items():
        np.testing.assert_array_equal(rest.parameters[name], value, err_msg=name)


def test_blas_runs_on_one_thread_while_training_and_as_before_after(encoder: Encoder) -> None:
    def threads() -> set[int]:
        return {int(pool["num_threads"]) for pool in threadpool_info() if pool["user_api"] == "blas"}

    during: list[set[int]] = []
    with threadpool_limits(limits=2, user_api="blas"):
        Trainer(replace(RECIPE, steps=2), encoder).run(lambda _: during.append(threads()))
        after = threads()
    assert (during, after) == ([{1}, {1}], {2})


def test_the_command_is_reproducible_and_exports_what_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocabulary: Path
) -> None:
    ranks = (vocabulary / "tiktoken.model").read_text().splitlines()
    monkeypatch.setattr(command, "train_ranks", lambda *_: _ordinary(ranks))
    recipe = replace(RECIPE, steps=4)
    first, second = (train_tiny(tmp_path / name, recipe) for name in ("a", "b"))
    assert first.checksum == second.checksum
    other = train_tiny(tmp_path / "c", replace(recipe, seed=1))
    assert other.checksum != first.checksum
    native, plain = read_parameters(first.native), read_parameters(first.plain)
    experts = [name for name in native if "switch_mlp" in name]
    assert all((native[name] == plain[name]).all() for name in native.keys() - set(experts))
    assert any((native[name] != plain[name]).any() for name in experts)
    with pytest.raises(UsageError, match="another recipe"):
        train_tiny(tmp_path / "a", replace(recipe, rate=0.5))
    assert train_tiny(tmp_path / "a", recipe).checksum == first.checksum


def _ordinary(lines: list[str]) -> tuple[bytes, ...]:
    import base64

    return tuple(base64.b64decode(line.split()[0]) for line in lines)


def test_the_schedule_rises_stays_and_falls_to_nothing() -> None:
    recipe = replace(RECIPE, steps=100, warmup_steps=10, decay_share=0.4, rate=1.0, aware_share=0.1)
    rates = [recipe.rate_at(step) for step in range(1, 101)]
    slow = [replace(recipe, slow_from=80, slow_rate=0.2).rate_at(step) for step in range(1, 101)]
    assert slow[:80] == rates[:80]
    assert slow[80:] == pytest.approx([0.01 * left for left in range(20, 0, -1)])
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:60] == [1.0] * 51
    assert rates == sorted(rates[:60]) + sorted(rates[60:], reverse=True)
    assert 0 < rates[-1] < 0.03
    assert next(step for step in range(1, 101) if recipe.is_aware(step)) == 91
