"""Traces that are made up, with a known answer: uniform, by Zipf's law, and scans."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from exo_kimi.errors import UsageError
from exo_kimi.experts.traces.trace import ExpertTrace

Kind = Literal["uniform", "zipf", "scan"]


def uniform(*, experts: int, chosen: int, tokens: int, layers: int = 1, seed: int = 0) -> ExpertTrace:
    """Every set of K experts equally often, each token for itself: no cache of S slots can hit more than S / E of the time."""
    return zipf(exponent=0.0, experts=experts, chosen=chosen, tokens=tokens, layers=layers, seed=seed)


def zipf(*, exponent: float, experts: int, chosen: int, tokens: int, layers: int = 1, seed: int = 0) -> ExpertTrace:
    """K different experts a token, drawn with chances in proportion to rank ** -exponent; each layer shuffles the ranks.

    Source: Gumbel's trick for draws without replacement, Kool et al. 2019.
    """
    _check(experts, chosen, tokens, layers)
    random = np.random.default_rng(seed)
    weights = -exponent * np.log(np.arange(1, experts + 1))
    ids = np.empty((layers, tokens, chosen), np.int64)
    for layer in range(layers):
        names = random.permutation(experts)
        noise = random.gumbel(size=(tokens, experts)) + weights
        ids[layer] = names[np.argpartition(-noise, chosen - 1, axis=1)[:, :chosen]]
    return ExpertTrace.of_tokens(ids, experts=experts, source=f"zipf {exponent:g}" if exponent else "uniform")


def scan(*, experts: int, chosen: int, tokens: int, layers: int = 1) -> ExpertTrace:
    """All experts in turn, again and again: the least recently used one is always the next to be asked for."""
    _check(experts, chosen, tokens, layers)
    row: NDArray[np.int64] = np.arange(tokens * chosen).reshape(tokens, chosen) % experts
    return ExpertTrace.of_tokens(np.stack([row] * layers), experts=experts, source="scan")


def made(
    kind: Kind, *, exponent: float, experts: int, chosen: int, tokens: int, layers: int = 1, seed: int = 0
) -> ExpertTrace:
    """A trace of a kind; the exponent counts for `zipf` alone, the seed not for `scan`."""
    if kind == "scan":
        return scan(experts=experts, chosen=chosen, tokens=tokens, layers=layers)
    strength = exponent if kind == "zipf" else 0.0
    return zipf(exponent=strength, experts=experts, chosen=chosen, tokens=tokens, layers=layers, seed=seed)


def scans_between(trace: ExpertTrace, *, every: int) -> ExpertTrace:
    """The same tokens with a whole scan of all experts after each `every` of them, as a long prompt between short answers."""
    length = -(-trace.experts // trace.chosen)
    sweep = scan(experts=trace.experts, chosen=trace.chosen, tokens=length).ids[0]
    parts = [
        np.concatenate([trace.ids[:, at : at + every], np.stack([sweep] * len(trace.layers))], axis=1)
        for at in range(0, trace.tokens, every)
    ]
    return ExpertTrace.of_tokens(
        np.concatenate(parts, axis=1), experts=trace.experts, layers=trace.layers, source=f"{trace.source} with scans"
    )


def _check(experts: int, chosen: int, tokens: int, layers: int) -> None:
    if not 1 <= chosen <= experts or tokens < 1 or layers < 1:
        raise UsageError(
            "a trace that cannot be made",
            expected="at least one token and layer, and experts a token from 1 to all",
            found=f"{chosen} of {experts} experts, {tokens} tokens, {layers} layers",
        )
