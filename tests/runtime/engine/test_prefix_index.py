"""Which cached prefix shares the most with a prompt: as looking at all of them says, and fast among thousands."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from exo_kimi.runtime.engine.prefix_index import CachedPrefix, PrefixIndex, Tokens, as_tokens, common_tokens
from tests.work import calls_of


class EveryOne:
    """The oracle: compares with every prefix."""

    def __init__(self) -> None:
        self.kept: dict[int, CachedPrefix] = {}

    def add(self, kept: CachedPrefix) -> list[CachedPrefix]:
        for other in self.kept.values():
            if common_tokens(kept.tokens, other.tokens) == len(kept.tokens):
                self.touch(other)
                return [kept]
        others = list(self.kept.values())
        covered = [other for other in others if common_tokens(kept.tokens, other.tokens) == len(other.tokens)]
        for other in covered:
            del self.kept[other.seq_id]
        self.kept[kept.seq_id] = kept
        return covered

    def touch(self, kept: CachedPrefix) -> None:
        self.kept[kept.seq_id] = self.kept.pop(kept.seq_id)

    def best(self, tokens: Tokens) -> tuple[CachedPrefix, int] | None:
        found = [(common_tokens(kept.tokens, tokens), -len(kept.tokens), kept) for kept in self.kept.values()]
        if not found:
            return None
        count, _, kept = max(found, key=lambda item: item[:2])
        return kept, count


few_ids = st.sampled_from([0, 1, 255, 256, 163_839, -1, 2**40])
actions = st.lists(st.tuples(st.sampled_from(["add", "best", "touch", "remove"]), st.lists(few_ids, max_size=5)))


@given(actions)
def test_it_is_what_comparing_with_all_of_them_finds(taken: list[tuple[str, list[int]]]) -> None:
    index, oracle = PrefixIndex(), EveryOne()
    for number, (action, ids) in enumerate(taken):
        tokens, kept = as_tokens(ids), list(oracle.kept.values())
        if action == "add":
            new = CachedPrefix(number, tokens)
            assert index.add(new) == oracle.add(new)
        elif action == "best":
            assert index.best(tokens) == oracle.best(tokens)
        elif kept:
            chosen = kept[len(ids) % len(kept)]
            if action == "touch":
                index.touch(chosen)
                oracle.touch(chosen)
            else:
                index.remove(chosen)
                del oracle.kept[chosen.seq_id]
        assert list(index) == list(oracle.kept.values())
        assert len(index) == len(oracle.kept)


def test_thousands_of_long_prompts_with_a_common_beginning_hold_nobody_up() -> None:
    """Comparing with each of 300 took 26 ms, on the loop that hands out everybody's tokens: a search by
    halves looks at few."""
    common = np.arange(40_000, dtype=np.int64)
    index = PrefixIndex()
    for number in range(300):
        index.add(CachedPrefix(number, np.append(common, number)))
    best, looks = calls_of(lambda: index.best(np.append(common, 300)), named="tobytes")
    assert best is not None
    assert looks < 40  # three searches by halves among 300, each look at one whole prompt
