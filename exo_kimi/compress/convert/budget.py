"""Bits for each module under a budget of bytes: a knapsack with one choice a module.

Minimise the sum over modules of worth * error^2: the squared error of the logits where errors of modules are independent. A
dynamic programme over units of bytes finds the best choice for bytes rounded up to units, which is exact for few modules; steps
along the convex hulls find one that is within a step of the best, which is next to nothing for many. The better counts. The
linear relaxation bounds from below what any choice could reach.
"""

from __future__ import annotations

import re
import tomllib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import tomli_w

from exo_kimi.checkpoint.quantization import QuantSpec
from exo_kimi.compress.convert.measure import BitOption, ModuleErrors
from exo_kimi.errors import UsageError
from exo_kimi.planner.weights.recipes import Recipe, parse_recipe
from exo_kimi.units import format_bytes

_UNITS = 20_000
_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True, kw_only=True)
class BitChoice:
    """A choice of bits for every module.

    Args:
        options: by path.
        nbytes: of these modules.
        error: the sum of squared errors.
        bound: what no choice within the budget is below.
    """

    options: Mapping[str, BitOption]
    nbytes: int
    error: float
    bound: float

    @property
    def gap(self) -> float:
        """How far from the best at most, as a share of its error."""
        return self.error / self.bound - 1 if self.bound else 0.0


def choose(modules: Sequence[ModuleErrors], budget_bytes: int) -> BitChoice:
    """The choice with the least sum of squared errors within a budget.

    Args:
        modules: what each choice costs.
        budget_bytes: of these modules alone.

    Raises:
        UsageError: the fewest bytes are more than the budget.
    """
    fewest = sum(module.options[0].nbytes for module in modules)
    if fewest > budget_bytes:
        raise UsageError(
            "the budget is below the fewest bits that there are",
            expected=f"at least {fewest:,} bytes for what can be packed",
            found=f"{budget_bytes:,} bytes",
            where="--budget",
        )
    most = sum(module.options[-1].nbytes for module in modules)
    room = min(budget_bytes, most) - fewest
    useful = [_useful(module) for module in modules]
    places = min(
        (_filled(useful, found, room) for found in (_programme(useful, room), _greedy(useful, room))),
        key=lambda found: sum(ways[place].error for ways, place in zip(useful, found, strict=True)),
    )
    chosen = [ways[place] for ways, place in zip(useful, places, strict=True)]
    return BitChoice(
        options={module.path: way.option for module, way in zip(modules, chosen, strict=True)},
        nbytes=sum(way.nbytes for way in chosen),
        error=sum(way.error for way in chosen),
        bound=_bound(useful, room),
    )


@dataclass(frozen=True, slots=True)
class _Way:
    """An option with its bytes and what its error counts in the sum."""

    option: BitOption
    nbytes: int
    error: float


def _useful(module: ModuleErrors) -> list[_Way]:
    """Options by bytes, without those that cost no less and err no less than another."""
    kept: list[_Way] = []
    for option in sorted(module.options, key=lambda each: (each.nbytes, each.error)):
        if not kept or module.worth * option.error**2 < kept[-1].error:
            kept.append(_Way(option, option.nbytes, module.worth * option.error**2))
    return kept


def _programme(modules: Sequence[Sequence[_Way]], room: int) -> list[int]:
    """Best places in each list: least[b] = min over options of least[b - units(option)] + its error.

    Units round each option's bytes above the cheapest up, so that the bytes always fit.
    """
    unit = max(1, -(-room // _UNITS))
    size = room // unit + 1
    least = np.zeros(size)
    taken: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
    costs = [[-(-(way.nbytes - ways[0].nbytes) // unit) for way in ways] for ways in modules]
    for ways, units in zip(modules, costs, strict=True):
        best = np.full(size, np.inf)
        choice = np.zeros(size, np.uint8)
        for place, (way, cost) in enumerate(zip(ways, units, strict=True)):
            if cost >= size:
                break
            candidate = np.full(size, np.inf)
            candidate[cost:] = least[: size - cost] + way.error
            better = candidate < best
            best[better] = candidate[better]
            choice[better] = place
        least = best
        taken.append(choice)
    position, places = size - 1, list[int]()
    for choice, units in zip(reversed(taken), reversed(costs), strict=True):
        place = int(choice[position])
        places.append(place)
        position -= units[place]
    return places[::-1]


@dataclass(frozen=True, slots=True)
class _Step:
    """From one point of a module's convex hull to the next; `place` is that of the better one."""

    module: int
    place: int
    nbytes: int
    gain: float

    @property
    def slope(self) -> float:
        return self.gain / self.nbytes


def _steps(modules: Sequence[Sequence[_Way]]) -> list[_Step]:
    """Every step, the steepest first; those of one module in their order."""
    steps: list[_Step] = []
    for number, ways in enumerate(modules):
        hull: list[_Way] = []
        for way in ways:
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], way):
                hull.pop()
            hull.append(way)
        for one, other in pairwise(hull):
            steps.append(_Step(number, ways.index(other), other.nbytes - one.nbytes, one.error - other.error))
    return sorted(steps, key=lambda step: -step.slope)


def _greedy(modules: Sequence[Sequence[_Way]], room: int) -> list[int]:
    """Steps while they fit."""
    places = [0] * len(modules)
    for step in _steps(modules):
        if step.nbytes > room:
            break
        room -= step.nbytes
        places[step.module] = step.place
    return places


def _filled(modules: Sequence[Sequence[_Way]], places: Sequence[int], room: int) -> list[int]:
    """A choice with what is left of the room spent, on the steepest change that fits, until none does."""
    chosen = list(places)
    left = room - sum(ways[place].nbytes - ways[0].nbytes for ways, place in zip(modules, chosen, strict=True))
    while True:
        changes = [
            (_slope(ways[chosen[number]], ways[place]), number, place)
            for number, ways in enumerate(modules)
            for place in range(chosen[number] + 1, len(ways))
            if ways[place].nbytes - ways[chosen[number]].nbytes <= left
        ]
        if not changes:
            return chosen
        _, number, place = max(changes)
        left -= modules[number][place].nbytes - modules[number][chosen[number]].nbytes
        chosen[number] = place


def _bound(modules: Sequence[Sequence[_Way]], room: int) -> float:
    """The linear relaxation: the steepest steps, the last one in part."""
    error = sum(ways[0].error for ways in modules)
    for step in _steps(modules):
        if step.nbytes > room:
            return error - step.gain * room / step.nbytes
        room -= step.nbytes
        error -= step.gain
    return error


def _slope(one: _Way, other: _Way) -> float:
    """Error saved for each byte."""
    return (one.error - other.error) / (other.nbytes - one.nbytes)


def recipe_text(choice: BitChoice, *, name: str, budget_bytes: int) -> str:
    """The choice as a recipe file: modules of one name and bits in one rule, with their layers."""
    grouped: dict[tuple[QuantSpec | None, str], list[int]] = defaultdict(list)
    single: dict[QuantSpec | None, list[str]] = defaultdict(list)
    for path, option in choice.options.items():
        layer = _LAYER.search(path)
        if layer is None:
            single[option.packing].append(path)
        else:
            grouped[option.packing, _LAYER.sub("*", path)].append(int(layer[0]))
    rules = [{**_bits(packing), "paths": paths} for packing, paths in single.items()]
    rules += [
        {**_bits(packing), "paths": [pattern], "layers": ranges(layers)}
        for (packing, pattern), layers in sorted(grouped.items(), key=lambda item: item[0][1])
    ]
    table = {
        "name": name,
        "title": f"chosen for {format_bytes(budget_bytes)}",
        "source": f"exo-kimi convert --budget: within {choice.gap:.1%} of the least sum of squared errors",
        "rest": {"bits": 16},
        "rule": rules,
    }
    return tomli_w.dumps(table)


def recipe_of(text: str) -> Recipe:
    """A recipe from the text of its file."""
    return parse_recipe(tomllib.loads(text), where="--budget")


def ranges(layers: Sequence[int]) -> list[str]:
    """Layers as a recipe writes them: `1-4`, `7`."""
    found: list[list[int]] = []
    for layer in sorted(layers):
        if found and layer == found[-1][1] + 1:
            found[-1][1] = layer
        else:
            found.append([layer, layer])
    return [str(first) if first == last else f"{first}-{last}" for first, last in found]


def _bits(packing: QuantSpec | None) -> dict[str, Any]:
    if packing is None:
        return {"bits": 16}
    return {"bits": packing.bits, "group_size": packing.group_size}
