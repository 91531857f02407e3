"""`exo-kimi train compare`: AdamW and Muon on the same budget, the same first weights and the same texts in the same order.

Every text is new to the model when it is shown, so the loss of a step is one on text that it has not seen.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory

from exo_kimi.compress.texts.encoding import Encoder
from exo_kimi.train.data.bpe import train_ranks
from exo_kimi.train.export import write_vocabulary
from exo_kimi.train.recipe import Matrices, TrainingRecipe
from exo_kimi.train.trainer import Trainer

_SMALL = {"hidden_size": 96, "intermediate_size": 192, "moe_intermediate_size": 32, "num_hidden_layers": 3}
_MATRICES: tuple[Matrices, ...] = ("adamw", "muon")


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonRun:
    """One training of a comparison: the optimizer of its matrices, learning rate, seed, losses in nats a token, seconds."""

    matrices: str
    rate: float
    seed: int
    losses: tuple[float, ...]
    seconds: float

    @property
    def loss(self) -> float:
        """Mean of the last tenth of the steps."""
        return fmean(self.losses[-max(1, len(self.losses) // 10) :])


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All runs of one budget."""

    steps: int
    group_tokens: int
    runs: tuple[ComparisonRun, ...]

    def best_rate(self, matrices: str) -> float:
        """The rate with the least loss, over seeds."""
        rates = {run.rate for run in self.runs}
        return min(sorted(rates), key=lambda rate: self._loss(matrices, rate))

    def steps_to_match(self) -> int | None:
        """Steps after which Muon at its best rate reaches the final loss of AdamW at its best (means of a tenth); None: never."""
        window = max(1, self.steps // 10)
        goal = self._loss("adamw", self.best_rate("adamw"))
        runs = [run for run in self.runs if run.matrices == "muon" and run.rate == self.best_rate("muon")]
        mean = [fmean(losses) for losses in zip(*(run.losses for run in runs), strict=True)]
        ends = range(window, self.steps + 1)
        return next((end for end in ends if fmean(mean[end - window : end]) <= goal), None)

    def to_text(self) -> str:
        """For people."""
        lines = [f"{self.steps} steps of {self.group_tokens} tokens; nats a token over the last tenth, mean of seeds"]
        for matrices in _MATRICES:
            for rate in sorted({run.rate for run in self.runs}):
                runs = self._of(matrices, rate)
                spread = f" +- {stdev(run.loss for run in runs):.3f}" if len(runs) > 1 else ""
                mark = "  <- best" if rate == self.best_rate(matrices) else ""
                seconds = fmean(run.seconds for run in runs)
                lines.append(
                    f"  {matrices:6} rate {rate:<7g} loss {self._loss(matrices, rate):.3f}{spread}  {seconds:.0f} s{mark}"
                )
        matched = self.steps_to_match()
        told = f"after {matched} of {self.steps} steps" if matched else "never"
        return "\n".join([*lines, f"Muon stands where AdamW's best ends: {told}"])

    def _of(self, matrices: str, rate: float) -> list[ComparisonRun]:
        return [run for run in self.runs if run.matrices == matrices and run.rate == rate]

    def _loss(self, matrices: str, rate: float) -> float:
        return fmean(run.loss for run in self._of(matrices, rate))


def compare(steps: int, rates: Sequence[float], seeds: Sequence[int]) -> Comparison:
    """Train a smaller Kimi once for each optimizer, rate and seed, with one schedule and without the INT4 finish."""
    base = TrainingRecipe()
    shape = {**base.shape, **_SMALL}
    recipe = replace(base, shape=shape, steps=steps, slow_from=steps, aware_share=0.0, warmup_steps=max(1, steps // 10))
    with TemporaryDirectory(prefix="compare-") as folder:
        write_vocabulary(Path(folder), recipe.raw_config, train_ranks(recipe.seed, recipe.ranks))
        encoder = Encoder.from_directory(Path(folder))
    return compare_with(encoder, recipe, rates, seeds)


def compare_with(encoder: Encoder, recipe: TrainingRecipe, rates: Sequence[float], seeds: Sequence[int]) -> Comparison:
    """Compare with an encoder and a recipe of the caller's."""
    runs = []
    for seed in seeds:
        for rate in rates:
            for matrices in _MATRICES:  # in turn, so that a machine that slows down slows both
                trainer = Trainer(replace(recipe, rate=rate, seed=seed, matrices=matrices), encoder)
                began = time.monotonic()
                trainer.run(lambda _: None)
                seconds = time.monotonic() - began
                runs.append(
                    ComparisonRun(
                        matrices=matrices, rate=rate, seed=seed, losses=tuple(trainer.losses), seconds=seconds
                    )
                )
                print(f"{matrices} rate {rate:g} seed {seed}: loss {runs[-1].loss:.3f}", file=sys.stderr)
    return Comparison(steps=recipe.steps, group_tokens=recipe.group_tokens, runs=tuple(runs))
