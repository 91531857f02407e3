"""`plan --fit`: the best quality that fits a cluster, of the model as it is, its measured forms and every recipe.

Measured forms are ranked by their KL. Recipes that nobody measured come after those, most bytes first: of one model, more bits
are better, and how much nobody said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from exo_kimi.errors import PlanInfeasibleError
from exo_kimi.planner.question import Question
from exo_kimi.planner.search.cost import PlacedSplit
from exo_kimi.planner.search.search import best_split
from exo_kimi.planner.weights.bytes import bytes_of_recipe
from exo_kimi.planner.weights.measured import MeasuredModel
from exo_kimi.planner.weights.recipes import load_recipe, recipe_names
from exo_kimi.units import format_gb

UNIFORM = ("uniform-8", "uniform-6", "uniform-5", "uniform-4", "uniform-3", "uniform-2")


@dataclass(frozen=True, slots=True, kw_only=True)
class FitCandidate:
    """One form of the model.

    Args:
        name: of the checkpoint, plan or recipe.
        total_bytes: of it.
        cost: in words.
        split: its best; None where it does not fit.
    """

    name: str
    total_bytes: int
    cost: str
    split: PlacedSplit | None

    @property
    def line(self) -> str:
        """For people."""
        fits = "fits" if self.split is not None else "does not fit"
        return f"{self.name:<28} {format_gb(self.total_bytes):>10}   {fits:<12}   {self.cost}"


def fit_candidates(question: Question, measured: Sequence[MeasuredModel]) -> tuple[FitCandidate, ...]:
    """Every form, the best first: as it is, the measured ones by their cost, the recipes by their bytes.

    Forms whose replies did not pass a gate come last.
    """
    found = [
        FitCandidate(
            name=question.model.name,
            total_bytes=question.model.total_bytes,
            cost=f"as it is ({question.model.source})",
            split=best_split(question),
        )
    ]
    ranked = sorted(measured, key=lambda one: one.kl)
    found += [_candidate(question, each) for each in ranked if not each.closed]
    found += _recipes(question)
    found += [_candidate(question, each) for each in ranked if each.closed]
    return tuple(found)


def best_fit(question: Question, measured: Sequence[MeasuredModel]) -> tuple[FitCandidate, tuple[FitCandidate, ...]]:
    """The first of the candidates that fits, and all of them.

    Raises:
        PlanInfeasibleError: none does.
    """
    candidates = fit_candidates(question, measured)
    for candidate in candidates:
        if candidate.split is not None:
            return candidate, candidates
    smallest = min(candidates, key=lambda each: each.total_bytes)
    raise PlanInfeasibleError(
        f"no form of {question.model.name} fits these machines",
        short={},
        changes=(),
        fix=f"the smallest, {smallest.name}, has {format_gb(smallest.total_bytes)}: add a machine, shorten the context, or "
        "prune and measure it (`exo-kimi prune`, `exo-kimi compare`)",
    )


def _candidate(question: Question, measured: MeasuredModel) -> FitCandidate:
    return FitCandidate(
        name=measured.name,
        total_bytes=measured.model.total_bytes,
        cost=measured.cost,
        split=best_split(replace(question, model=measured.model)),
    )


def _recipes(question: Question) -> list[FitCandidate]:
    model, found = question.model, []
    for name in (*recipe_names(), *UNIFORM):
        other = replace(
            bytes_of_recipe(model.config, load_recipe(name), name=name),
            kv_bits=model.kv_bits,
            vision_bytes=model.vision_bytes,
        )
        if other.total_bytes < model.total_bytes:
            found.append(
                FitCandidate(
                    name=name,
                    total_bytes=other.total_bytes,
                    cost="not measured",
                    split=best_split(replace(question, model=other)),
                )
            )
    return sorted(found, key=lambda each: (-each.total_bytes, each.name))
