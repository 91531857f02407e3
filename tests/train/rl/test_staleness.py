"""The experiment with a stale sampler: its measure is the policy's own greedy replies, its table has every arm."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from exo_kimi.client.demo import shipped_model
from exo_kimi.compress.texts.encoding import Encoder
from exo_kimi.models.rope import Rope
from exo_kimi.train.data.batches import make_batch
from exo_kimi.train.model.forward import predictions
from exo_kimi.train.rl.recipe import GrpoRecipe
from exo_kimi.train.rl.staleness import ArmResult, held_out_sums, share_right, to_text
from exo_kimi.train.rl.trainer import GrpoTrainer
from exo_kimi.train.tasks import arithmetic


def test_the_share_counts_replies_that_the_policy_would_say(tmp_path: Path) -> None:
    encoder = Encoder.from_directory(shipped_model())
    texts = held_out_sums(encoder, arithmetic.addition, 12)
    assert len({text.ids.tobytes() for text in texts}) == 12
    trainer = GrpoTrainer(GrpoRecipe(steps=1), shipped_model(), tmp_path)
    for text in texts[::3]:
        text.ids[-3] += 1  # a digit of the answer, which nobody would say
    wavelengths = np.array(Rope.of(trainer.config).wavelengths)
    alone = []
    for text in texts:
        batch = make_batch([text])
        alone.append((predictions(trainer.effective(), trainer.config, wavelengths, batch) == batch.targets).all())
    assert 0 < np.mean(alone) < 1
    assert share_right(trainer, texts) == np.mean(alone)


def test_the_table_has_means_and_deviations_of_every_arm() -> None:
    results = [
        ArmResult(arm=arm, seed=seed, carry=carry + seed / 10, others=0.5, kl=0.25)
        for arm, carry in (("fresh", 0.8), ("stale", 0.2))
        for seed in (0, 1)
    ]
    lines = to_text(results).splitlines()
    assert lines[1].split() == ["fresh", "0.850", "+-", "0.071", "0.500", "+-", "0.000", "0.250", "+-", "0.000"]
    assert lines[2].startswith("stale")
    assert "+-" not in to_text(results[:1])
