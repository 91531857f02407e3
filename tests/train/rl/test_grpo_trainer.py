"""Two small steps of GRPO: a resumed run is the run, the same seed gives the same file, what is exported is what was rewarded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.fingerprint import norms_fingerprint
from exo_kimi.errors import UsageError
from exo_kimi.train.export import read_parameters, write_checkpoint
from exo_kimi.train.model.parameters import BIAS, first_values, is_expert
from exo_kimi.train.rl import command, rewards
from exo_kimi.train.rl.command import train_grpo
from exo_kimi.train.rl.prompts import FOCUS
from exo_kimi.train.rl.recipe import GrpoRecipe
from exo_kimi.train.rl.trainer import GrpoProgress, GrpoTrainer, is_trained
from tests.train.conftest import RECIPE as SMALL

RECIPE = GrpoRecipe(
    steps=2,
    prompts_per_step=2,
    num_generations=4,
    max_completion_length=12,
    learning_rate=2e-3,
    replay_tokens=100,
    warmup_steps=1,
    shares={FOCUS: 1.0},
    seed=3,
)


@pytest.fixture(scope="module")
def small(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights, whose completions differ."""
    directory = tmp_path_factory.mktemp("grpo") / "small"
    rng = np.random.default_rng(0)
    values = {
        name: value if "norm" in name else value + np.float32(0.05) * rng.standard_normal(value.shape, np.float32)
        for name, value in first_values(SMALL.config, 0).items()
    }
    write_checkpoint(directory, vocabulary, values, layout="int4")
    return directory


@pytest.fixture(autouse=True)
def coins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right is about every second reply of a model that knows nothing."""
    monkeypatch.setattr(rewards, "is_right", lambda prompt, reply: len(reply.reasoning + reply.content) % 2 == 0)


def trained(recipe: GrpoRecipe, directory: Path, scratch: Path, *, until: int) -> GrpoTrainer:
    trainer = GrpoTrainer(recipe, directory, scratch)
    trainer.run(lambda _: None, until=until)
    return trainer


def test_a_resumed_training_is_the_training_and_the_seed_decides_the_file(small: Path, tmp_path: Path) -> None:
    whole = trained(RECIPE, small, tmp_path / "whole", until=2)
    half = trained(RECIPE, small, tmp_path / "half", until=1)
    half.save(tmp_path / "state.npz")
    rest = GrpoTrainer(RECIPE, small, tmp_path / "rest")
    rest.resume(tmp_path / "state.npz")
    assert rest.history == half.history
    rest.run(lambda _: None)
    assert rest.losses == whole.losses
    for name, value in whole.parameters.items():
        np.testing.assert_array_equal(rest.parameters[name], value, err_msg=name)
    for trainer, name in ((whole, "a"), (rest, "b")):
        trainer.export(tmp_path / name)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()

    # What was learnt, and what was not.
    assert whole.history[0].mixed > 0
    moved = {name for name, value in whole.parameters.items() if (value != whole.reference[name]).any()}
    assert moved <= {name for name in whole.parameters if is_trained(name) or BIAS in name}
    assert any(is_expert(name) for name in moved)
    assert any(BIAS in name for name in moved)
    assert norms_fingerprint(Checkpoint(tmp_path / "a").manifest()) == norms_fingerprint(Checkpoint(small).manifest())
    exported, effective = read_parameters(tmp_path / "a"), whole.effective()
    for name in (name for name in effective if is_expert(name)):
        np.testing.assert_array_equal(exported[name], effective[name], err_msg=name)


def test_a_step_reports_groups_ratios_and_weights(small: Path, tmp_path: Path) -> None:
    seen: list[GrpoProgress] = []
    trainer = GrpoTrainer(replace(RECIPE, steps=1, num_iterations=3), small, tmp_path / "sampler")
    trainer.run(seen.append)
    (step,) = seen
    assert step.mixed + step.all_right + step.all_wrong == RECIPE.prompts_per_step
    assert 0 < step.right < 1
    assert step.right == step.focus_right
    assert step.kl > 0  # of the third update, after two
    assert step.weight == pytest.approx(1, abs=0.01)
    assert step.tokens == round(step.length * RECIPE.prompts_per_step * RECIPE.num_generations)


def test_a_step_without_a_mixed_group_draws_more_waves_and_changes_nothing(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewards, "is_right", lambda prompt, reply: True)
    recipe = replace(RECIPE, steps=1, max_waves=2, prompts_per_step=1, num_generations=2)
    trainer = trained(recipe, small, tmp_path, until=1)
    assert (trainer.history[0].mixed, trainer.history[0].all_right) == (0, 2)
    for name, value in trainer.reference.items():
        np.testing.assert_array_equal(trainer.parameters[name], value)


def test_a_stale_sampler_keeps_the_weights_it_got(small: Path, tmp_path: Path) -> None:
    trainer = trained(replace(RECIPE, weight_sync_steps=2), small, tmp_path / "sampler", until=2)
    stale = read_parameters(tmp_path / "sampler")
    for name, value in trainer.reference.items():
        np.testing.assert_array_equal(stale[name], value)
    assert trainer.history[0].difference < 1e-3 < trainer.history[1].difference


def test_the_command_writes_a_checkpoint_and_refuses_another_recipe(small: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, steps=1, prompts_per_step=1, num_generations=2, max_completion_length=8)
    made = train_grpo(small, tmp_path, recipe)
    assert Checkpoint(made.native).config == Checkpoint(small).config
    assert made.checksum in made.to_text()
    assert (tmp_path / "curves.png").exists() is (made.curves is not None)
    assert train_grpo(small, tmp_path, recipe).checksum == made.checksum  # it had ended
    with pytest.raises(UsageError, match="another recipe"):
        train_grpo(small, tmp_path, replace(recipe, beta=0.5))


def test_a_large_model_is_refused(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_MOST_PARAMETERS", 1000)
    with pytest.raises(UsageError, match="too large"):
        train_grpo(small, tmp_path, RECIPE)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_generations", 1),
        ("steps", 0),
        ("beta", -0.1),
        ("importance_sampling_clip_max", 0.5),
        ("num_iterations", 0),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(field: str, value: float) -> None:
    with pytest.raises(UsageError, match=field):
        replace(RECIPE, **{field: value})  # type: ignore[arg-type]


def test_the_rate_rises_stays_and_falls_to_nothing() -> None:
    recipe = replace(RECIPE, steps=20, warmup_steps=4, decay_share=0.5, learning_rate=1.0)
    rates = [recipe.rate_at(step) for step in range(1, 21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1)
