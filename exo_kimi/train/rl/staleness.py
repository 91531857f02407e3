"""A sampler that is never given new weights, with truncated importance sampling and without, over a few seeds.

    python -m exo_kimi.train.rl.staleness DIR --seeds 3 --steps 10

The sampler draws from DIR throughout, while the policy moves away from it. Of each end: the share of held-out sums, those with a
carry of the form 4x + 3x and others, whose own reply is the policy's first choice token by token, and the KL divergence to DIR.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import fmean, stdev
from tempfile import TemporaryDirectory

import numpy as np

from exo_kimi.compress.texts.encoding import Encoded, Encoder
from exo_kimi.models.rope import Rope
from exo_kimi.train.data.batches import make_batch
from exo_kimi.train.data.conversations import TrainingConversation, single
from exo_kimi.train.model.forward import predictions
from exo_kimi.train.rl.prompts import FOCUS
from exo_kimi.train.rl.recipe import GrpoRecipe
from exo_kimi.train.rl.trainer import GrpoTrainer
from exo_kimi.train.tasks import arithmetic
from exo_kimi.train.tasks.turn import Task, draw

_TOGETHER = 40
_OTHER_SUMS = 160
_PATIENCE = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to train: how often the sampler gets weights (0: never again), and whether tokens are weighed."""

    name: str
    weight_sync_steps: int
    importance_sampling: bool


ARMS = (
    Arm(name="fresh, weighed", weight_sync_steps=1, importance_sampling=True),
    Arm(name="stale, weighed", weight_sync_steps=0, importance_sampling=True),
    Arm(name="stale, not weighed", weight_sync_steps=0, importance_sampling=False),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmResult:
    """Where one training ended: shares of held-out sums right, and KL in nats a token of the last step's completions."""

    arm: str
    seed: int
    carry: float
    others: float
    kl: float


def main(argv: Sequence[str] | None = None) -> int:
    """Train every arm with every seed, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    given = parser.parse_args(argv)
    results = []
    for seed in range(given.seeds):
        for arm in ARMS:
            results.append(run_arm(given.directory, arm, steps=given.steps, seed=seed))
            print(results[-1], file=sys.stderr, flush=True)
    print(to_text(results))
    return 0


def run_arm(directory: Path, arm: Arm, *, steps: int, seed: int) -> ArmResult:
    """One training of a few small steps."""
    recipe = GrpoRecipe(
        steps=steps,
        prompts_per_step=6,
        weight_sync_steps=arm.weight_sync_steps or steps,
        importance_sampling_correction=arm.importance_sampling,
        max_completion_length=48,
        learning_rate=3e-4,
        warmup_steps=1,
        decay_share=0.0,
        replay_tokens=0,
        shares={FOCUS: 2.0, "sums": 1.0},
        seed=seed,
    )
    encoder = Encoder.from_directory(directory)
    with TemporaryDirectory(prefix="staleness-") as folder:
        trainer = GrpoTrainer(recipe, directory, Path(folder) / "sampler")
        trainer.run(lambda _: None)
    return ArmResult(
        arm=arm.name,
        seed=seed,
        carry=share_right(trainer, held_out_sums(encoder, arithmetic.carry_sum, _OTHER_SUMS)),
        others=share_right(trainer, held_out_sums(encoder, arithmetic.addition, _OTHER_SUMS)),
        kl=next((step.kl for step in reversed(trainer.history) if step.mixed), 0.0),
    )


def held_out_sums(encoder: Encoder, task: Task, count: int) -> list[Encoded]:
    """At most `count` different held-out sums with their replies, the same each time."""
    rng, found, tries = Random(task.__name__), dict[str, Encoded](), 0
    while len(found) < count and tries < _PATIENCE:
        turn, tries = draw(task, rng, evaluation=True), tries + 1
        if turn.question not in found:
            found[turn.question] = encoder.encode(TrainingConversation(messages=single(turn)))
            tries = 0
    return list(found.values())


def share_right(trainer: GrpoTrainer, texts: Sequence[Encoded]) -> float:
    """The share of texts whose every counted token is the policy's first choice: it would say the same, greedily."""
    wavelengths = np.array(Rope.of(trainer.config).wavelengths)
    effective = trainer.effective()
    ordered = sorted(texts, key=lambda text: len(text.ids), reverse=True)  # as `make_batch` lays them out
    right = 0
    for start in range(0, len(ordered), _TOGETHER):
        part = ordered[start : start + _TOGETHER]
        batch = make_batch(part)
        hits = predictions(effective, trainer.config, wavelengths, batch) == batch.targets
        ends = np.cumsum([int(text.counted[1:].sum()) for text in part])
        right += sum(bool(each.all()) for each in np.split(hits, ends[:-1]))
    return right / len(texts)


def to_text(results: Sequence[ArmResult]) -> str:
    """A table of means and deviations over seeds."""
    lines = [f"{'sampler':<20} {'4x + 3x':>15} {'other sums':>15} {'KL, nats':>17}"]
    for arm in dict.fromkeys(each.arm for each in results):
        of_arm = [each for each in results if each.arm == arm]
        cells = [_cell([getattr(each, name) for each in of_arm]) for name in ("carry", "others", "kl")]
        lines.append(f"{arm:<20} {cells[0]:>15} {cells[1]:>15} {cells[2]:>17}")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    spread = f" +- {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{spread}"


if __name__ == "__main__":
    sys.exit(main())
