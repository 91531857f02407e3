"""On the shipped tiny Kimi, half of the experts by leave-one-out cost less than by weight norms or by chance.

A small look that a suite can afford; docs/prune.md has the table over 300 and 60 texts, where it is a fifth of weight norm's.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from statistics import median

import exo_kimi
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.compress.calibrate.calibrate import Calibration, calibrate
from exo_kimi.compress.calibrate.scores import Criterion
from exo_kimi.compress.compare.walks import pairs_of, walk_texts
from exo_kimi.compress.layers import LayerWalk
from exo_kimi.compress.prune.mask import masking
from exo_kimi.compress.prune.prune import PruneWish, make_plan
from exo_kimi.compress.texts.encoding import Encoder
from exo_kimi.train.data.conversations import training_conversation
from exo_kimi.train.evaluation.evaluate import held_out_texts

TINY = Path(exo_kimi.__file__).parent / "data" / "tiny-kimi-k2"


def test_leave_one_out_costs_less_than_weight_norms_and_chance() -> None:
    encoder, checkpoint = Encoder.from_directory(TINY), Checkpoint(TINY)
    rng = Random("calibration")
    texts = [encoder.encode(training_conversation(rng)) for _ in range(30)]
    measured = calibrate(Calibration(walk=LayerWalk(checkpoint=checkpoint, dtype="float32"), texts=texts))
    held_out = held_out_texts(encoder, 12, seed=7)
    original = walk_texts(LayerWalk(checkpoint=checkpoint, dtype="float32"), held_out)

    def cost(criterion: Criterion, seed: int = 0) -> float:
        plan = make_plan(checkpoint, PruneWish(keep=8, measured=measured, criterion=criterion, seed=seed))
        walk = LayerWalk(checkpoint=checkpoint, dtype="float32", change=masking(plan, checkpoint.config))
        return float(pairs_of(original, walk_texts(walk, held_out), held_out).kl.mean())

    best = cost("leave-one-out")
    assert best < cost("weight-norm")
    assert best < median(cost("random", seed) for seed in range(3))
