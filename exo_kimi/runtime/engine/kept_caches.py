"""Caches over an epoch: which of those that the leader knew at its end every stage still holds, and of how many tokens.

A stage that started anew holds none, one whose step was broken off holds none, and of the others some are a few steps ahead: what
all of them hold of one sequence is the fewest tokens of any, and these are the first ones that the leader knows of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from exo_kimi.runtime.engine.prefix_index import Tokens
from exo_kimi.runtime.steps import HeldCaches


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownCaches:
    """What the leader knows of caches on the stages.

    Args:
        seq_id: their name.
        tokens: what they hold, as prefixes are compared, or on some stages only the first of it.
        reserved_tokens: of KV memory.
        before: the same caches under the name that stages know them by that have not heard of this one.
    """

    seq_id: int
    tokens: Tokens
    reserved_tokens: int
    before: KnownCaches | None = None


def held_by_all(known: Iterable[KnownCaches], stages: Sequence[Sequence[HeldCaches]]) -> Iterator[KnownCaches]:
    """Cut what was known to what every stage holds.

    Args:
        known: when the epoch ended.
        stages: for each, what it holds.

    Returns:
        Those of which all stages hold a token, under the name that all of them know, in the order of `known`.
    """
    named = [{each.seq_id: each for each in held} for held in stages]
    for each in known if named else ():
        found: KnownCaches | None = each
        while found is not None:
            if count := _common_tokens(found, named):
                yield replace(found, tokens=found.tokens[:count], before=None)
                break
            found = found.before


def _common_tokens(known: KnownCaches, stages: Sequence[Mapping[int, HeldCaches]]) -> int:
    held = [stage[known.seq_id] for stage in stages if known.seq_id in stage]
    if len(held) < len(stages):
        return 0
    count = min(len(known.tokens), *(each.tokens for each in held))
    return count if count >= max(each.least_tokens for each in held) else 0
