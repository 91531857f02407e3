"""Replays: what a trace would have hit and read, by policy and number of slots, with the slots that the engine uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from exo_kimi.errors import UsageError
from exo_kimi.experts.layer_cache import HitCounters, LayerCache
from exo_kimi.experts.policies import make_policy
from exo_kimi.experts.traces.bounds import Requests, belady_hits, che_hit_rate
from exo_kimi.experts.traces.trace import ExpertTrace

PARTS = 4
"""Of a trace, to see how much hit rates change along it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What one policy with one number of slots does with a trace.

    Args:
        policy: its name, or `belady`.
        slots: of each layer.
        layers: what each layer counted.
        parts: hit rate of each quarter of the trace, over all layers.
    """

    policy: str
    slots: int
    layers: tuple[HitCounters, ...]
    parts: tuple[float, ...]

    @property
    def hits(self) -> int:
        """Over all layers."""
        return sum(layer.hits for layer in self.layers)

    @property
    def misses(self) -> int:
        """Over all layers: experts that are read."""
        return sum(layer.misses for layer in self.layers)

    @property
    def hit_rate(self) -> float:
        """Of all experts asked for, each once a pass."""
        return self.hits / (self.hits + self.misses)


def replay(trace: ExpertTrace, policy: str, slots: int, *, learnt: ExpertTrace | None = None) -> Replay:
    """Every pass of a trace through the slots of its layers, which are empty before the first.

    Args:
        trace: what is asked for.
        policy: one of `policies.POLICY_NAMES`, or `belady`, which knows what comes.
        slots: of each layer.
        learnt: whose most used experts `pinned` keeps; the trace itself when not given, which is more than could be known.

    Raises:
        UsageError: no slots, no such policy, or another model's trace to learn from.
    """
    if slots < 1:
        raise UsageError("a layer without slots", expected="at least 1", found=slots, where="--slots")
    if learnt is not None and (learnt.experts, learnt.layers) != (trace.experts, trace.layers):
        raise UsageError(
            "the profile is of another model",
            expected=f"{len(trace.layers)} layers of {trace.experts} experts",
            found=f"{len(learnt.layers)} layers of {learnt.experts}",
        )
    popularity = (trace if learnt is None else learnt).popularity()
    layers, parts = [], np.zeros((PARTS, 2), np.int64)
    for index in range(len(trace.layers)):
        requests = trace.requests(index)
        bounds = np.linspace(0, len(requests), PARTS + 1).astype(int).tolist()
        if policy == "belady":
            counters, along = _belady(requests, slots, bounds)
        else:
            profile = np.argsort(-popularity[index], kind="stable").tolist()
            cache = LayerCache(slots, make_policy(policy, slots=slots, profile=profile))
            counters, along = _through(cache, requests, bounds)
        layers.append(counters)
        parts += along
    rates = tuple(float(hits / asked) if asked else 1.0 for hits, asked in parts.tolist())
    return Replay(policy=policy, slots=slots, layers=tuple(layers), parts=rates)


def che(trace: ExpertTrace, slots: int) -> float:
    """Hit rate that Che's approximation gives least recently used, from how often each expert of each layer is chosen alone."""
    return float(np.mean([che_hit_rate(layer, slots) for layer in trace.popularity()]))


def _through(cache: LayerCache, requests: Requests, bounds: Sequence[int]) -> tuple[HitCounters, np.ndarray]:
    along = []
    for start, end in pairwise(bounds):
        before = (cache.counters.hits, cache.counters.hits + cache.counters.misses)
        for experts in requests[start:end]:
            cache.install(cache.request(experts))
        along.append((cache.counters.hits - before[0], cache.counters.hits + cache.counters.misses - before[1]))
    return cache.counters, np.array(along, np.int64)


def _belady(requests: Requests, slots: int, bounds: Sequence[int]) -> tuple[HitCounters, np.ndarray]:
    hit = belady_hits(requests, slots)
    asked = [len(experts) for experts in requests]
    along = [(sum(hit[start:end]), sum(asked[start:end])) for start, end in pairwise(bounds)]
    return HitCounters(hits=sum(hit), misses=sum(asked) - sum(hit)), np.array(along, np.int64)
