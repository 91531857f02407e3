"""The training loop: resumable, and the same for the same seed on the same machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exo_kimi.compress.texts.encoding import Encoder
from exo_kimi.errors import UsageError
from exo_kimi.models.rope import Rope
from exo_kimi.train.data.batches import make_batch, training_groups
from exo_kimi.train.model.forward import Batch, loss_and_gradients
from exo_kimi.train.model.layers import Parameters, add_gradient
from exo_kimi.train.model.parameters import BIAS, decays, fake_quant, first_values, is_expert, is_matrix
from exo_kimi.train.optimizers import Optimizer, clip
from exo_kimi.train.recipe import TrainingRecipe
from exo_kimi.train.resumable import ResumableTraining

_WORKERS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingProgress:
    """One step, as it is reported: loss in nats a counted token, norm of the gradients before clipping, tokens read, rate."""

    step: int
    loss: float
    norm: float
    tokens: int
    rate: float


class Trainer(ResumableTraining):
    """A training: parameters, optimizer and the step it has reached.

    Args:
        recipe: what to train and how long.
        encoder: encodes the texts.
    """

    def __init__(self, recipe: TrainingRecipe, encoder: Encoder) -> None:
        self.recipe = recipe
        self.config = recipe.config
        self.parameters = first_values(self.config, recipe.seed)
        self.step = 0
        self.losses: list[float] = []
        self._encoder = encoder
        self._wavelengths = np.array(Rope.of(self.config).wavelengths)
        self._optimizer = Optimizer(
            {name: value for name, value in self.parameters.items() if BIAS not in name},
            is_matrix=lambda name: recipe.matrices == "muon" and is_matrix(name),
            decays=decays,
            weight_decay=recipe.weight_decay,
        )

    def run(self, report: Callable[[TrainingProgress], None], *, until: int | None = None) -> None:
        """Train on from the step it has reached, to the end of the recipe or to step `until`."""
        last = self.recipe.steps if until is None else until
        groups = training_groups(
            self._encoder,
            self.recipe.seed,
            self.recipe.group_tokens,
            start=self.step,
            parts_from=(self.recipe.later_from, self.recipe.last_from),
        )
        with one_blas_thread(), ThreadPoolExecutor(_WORKERS) as pool:
            coming = pool.submit(next, groups)
            while self.step < last:
                group = coming.result()
                coming = pool.submit(next, groups)
                # Every worker takes each second conversation by length: the same work, and sums in a fixed order.
                ordered = sorted(group, key=lambda item: len(item.ids))
                batches = [make_batch(ordered[worker::_WORKERS]) for worker in range(_WORKERS)]
                report(self._update(batches, pool))

    def effective(self) -> Parameters:
        """The parameters that the forward pass uses now."""
        if not self.recipe.is_aware(self.step + 1):
            return self.parameters
        return {name: fake_quant(value) if is_expert(name) else value for name, value in self.parameters.items()}

    def _update(self, batches: list[Batch], pool: ThreadPoolExecutor) -> TrainingProgress:
        effective = self.effective()
        outcomes = list(
            pool.map(lambda batch: loss_and_gradients(effective, self.config, self._wavelengths, batch), batches)
        )
        counted = sum(len(batch.targets) for batch in batches)
        gradients = summed([outcome.gradients for outcome in outcomes])
        for value in gradients.values():
            value /= np.float32(counted)
        norm = clip(gradients, self.recipe.clip_norm)
        self.step += 1
        rate = self.recipe.rate_at(self.step)
        self._optimizer.update(gradients, rate=rate, step=self.step)
        balance(self.parameters, [outcome.loads for outcome in outcomes], self.recipe.bias_rate)
        self.losses.append(sum(outcome.loss for outcome in outcomes) / counted)
        tokens = sum(len(batch.inputs) for batch in batches)
        return TrainingProgress(step=self.step, loss=self.losses[-1], norm=norm, tokens=tokens, rate=rate)


def summed(parts: Sequence[Parameters]) -> Parameters:
    """The sum of gradients, in the memory of the first."""
    first, *others = parts
    for other in others:
        for name, value in other.items():
            add_gradient(first, name, value)
    return first


def balance(parameters: Parameters, parts: Sequence[Mapping[int, NDArray[np.int64]]], rate: float) -> None:
    """Steer tokens from busy experts to idle ones, by the loads of each MoE layer. Source: "DeepSeek-V3", section 2.1.2."""
    for layer in parts[0]:
        load = np.sum([loads[layer] for loads in parts], axis=0)
        bias = parameters[f"model.layers.{layer}.mlp.gate.{BIAS}"]
        bias += np.float32(rate) * np.sign(load.mean() - load).astype(np.float32)


def one_blas_thread() -> AbstractContextManager[object]:
    """Keep matrix products on the calling thread, for as long as the context lasts.

    The trainer's workers fill the cores. BLAS threads beside them wait for each other by spinning (20 times slower on a busy
    machine of 2 cores), and split sums as the load of the moment has it: the same seed would not give the same weights.

    Raises:
        UsageError: threadpoolctl is not installed.
    """
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        raise UsageError(
            "training needs threadpoolctl",
            found="not installed",
            fix="install the extra: pip install 'exo-kimi[train]'",
        ) from None
    limits: AbstractContextManager[object] = threadpool_limits(limits=1, user_api="blas")
    return limits
