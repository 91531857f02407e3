"""The training loop of an adapter: AdamW over whoever's gradients; resumable, and the same for the same seed on one machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from exo_kimi.checkpoint.adapters.manifest import LowRank
from exo_kimi.compress.texts.encoding import Encoded
from exo_kimi.train.lora.recipe import LoraRecipe
from exo_kimi.train.model.layers import Parameters
from exo_kimi.train.optimizers import Optimizer
from exo_kimi.train.resumable import ResumableTraining


class AdapterGradients(Protocol):
    """A base with an adapter, in MLX or in NumPy. Parameters are float32, as `model.layers.0.self_attn.o_proj.lora_a`."""

    def first_values(self) -> Parameters:
        """What training begins with: B is zero, so that nothing is changed."""

    def gradients(self, parameters: Parameters, texts: Sequence[Encoded], *, step: int) -> tuple[float, Parameters]:
        """The loss in nats a counted token of a step's texts, and its gradients."""

    def loss(self, parameters: Parameters, texts: Sequence[Encoded]) -> float:
        """The same loss without gradients and dropout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraProgress:
    """One step, as it is reported: loss in nats a token of the assistant, tokens read."""

    step: int
    loss: float
    tokens: int


class LoraTrainer(ResumableTraining):
    """A training: the adapter, its optimizer and the step it has reached.

    Args:
        recipe: what to train and how long.
        base: gives gradients.
        texts: rows with counted tokens.
    """

    def __init__(self, recipe: LoraRecipe, base: AdapterGradients, texts: Sequence[Encoded]) -> None:
        self.recipe, self._base = recipe, base
        cut = [_cut(text, recipe.max_seq_length) for text in texts]
        self.texts = sorted((text for text in cut if text.counted[1:].any()), key=lambda text: len(text.ids))
        self.step = 0
        self.losses: list[float] = []
        self.parameters = base.first_values()
        self._optimizer = Optimizer(
            self.parameters, is_matrix=lambda _: False, decays=lambda _: False, weight_decay=0.0
        )

    def run(self, report: Callable[[LoraProgress], None], *, until: int | None = None) -> None:
        """Train on from the step it has reached, to the end of the recipe or to step `until`."""
        for texts in self._batches(self.step, self.recipe.iters if until is None else until):
            loss, gradients = self._base.gradients(self.parameters, texts, step=self.step)
            self.step += 1
            self._optimizer.update(gradients, rate=self.recipe.learning_rate, step=self.step)
            self.losses.append(loss)
            report(LoraProgress(step=self.step, loss=loss, tokens=sum(len(text.ids) for text in texts)))

    def loss_of(self, texts: Sequence[Encoded]) -> list[tuple[float, int]]:
        """Of each text the summed loss and its counted tokens, with the adapter as it is now."""
        cut = [_cut(text, self.recipe.max_seq_length) for text in texts]
        counts = [int(text.counted[1:].sum()) for text in cut]
        return [
            (self._base.loss(self.parameters, [text]) * count, count)
            for text, count in zip(cut, counts, strict=True)
            if count
        ]

    def modules(self) -> dict[str, LowRank]:
        """The adapter as it is now, by module."""
        return modules_of(self.parameters, self.recipe.scale)

    def _batches(self, first: int, last: int) -> Iterator[Sequence[Encoded]]:
        """Rows of like lengths, in an order that is another in each epoch: batch n is the same wherever one began."""
        size = self.recipe.batch_size
        starts = range(0, len(self.texts), size)
        for step in range(first, last):
            epoch, place = divmod(step, len(starts))
            order = np.random.default_rng([self.recipe.seed, epoch, 2]).permutation(len(starts))
            start = starts[int(order[place])]
            yield self.texts[start : start + size]


def modules_of(parameters: Parameters, scale: float) -> dict[str, LowRank]:
    """Parameters of an adapter by module."""
    return {
        path: LowRank(
            lora_a=parameters[f"{path}.lora_a"],
            lora_b=parameters[f"{path}.lora_b"],
            magnitude=parameters.get(f"{path}.m"),
            scale=scale,
        )
        for path in (name.removesuffix(".lora_a") for name in parameters if name.endswith(".lora_a"))
    }


def first_matrices(recipe: LoraRecipe, path: str, shape: tuple[int, ...]) -> Parameters:
    """A of mlx-lm's distribution, B zero, of a module (out, in)."""
    out, into = shape
    rng = np.random.default_rng([recipe.seed, 1, *path.encode()])
    edge = into**-0.5
    return {
        f"{path}.lora_a": rng.uniform(-edge, edge, (into, recipe.rank)).astype(np.float32),
        f"{path}.lora_b": np.zeros((recipe.rank, out), np.float32),
    }


def _cut(text: Encoded, most_tokens: int) -> Encoded:
    return Encoded(ids=text.ids[:most_tokens], counted=text.counted[:most_tokens], domain=text.domain)
