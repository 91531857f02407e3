"""Passes cut by a budget: every row once, the same numbers, and no more memory than was given."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.scratch import attention_bytes, scratch_needed
from exo_kimi.models.blocks import pieces_of
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.models.mla import Attention, Span
from exo_kimi.models.ops import KVCache
from exo_kimi.models.rope import Rope


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=5), st.integers(1, 12))
def test_pieces_hold_every_row_once_and_in_order(segments_asked: list[tuple[int, int]], most: int) -> None:
    segments = [(length, [str(index)]) for index, (length, _) in enumerate(segments_asked)]
    asked = [min(pair) for pair in segments_asked]
    found: list[tuple[str, bool]] = []
    at = 0
    for rows, pieces, ends in pieces_of(segments, asked, most):
        assert rows.start == at and 0 < rows.stop - rows.start <= most
        assert sum(taken for taken, _ in pieces) == rows.stop - rows.start
        for (taken, (name,)), count in zip(pieces, ends, strict=True):
            found += [(name, row >= taken - count) for row in range(taken)]
        at = rows.stop
    assert found == [
        (name, row >= length - count)
        for (length, (name,)), count in zip(segments, asked, strict=True)
        for row in range(length)
    ]


def test_a_pass_in_pieces_gives_what_the_whole_gives(model: Model, tokens: mx.array) -> None:
    def run(scratch_bytes: int) -> tuple[np.ndarray, list[int]]:
        model.set_scratch_bytes(scratch_bytes)
        first, second = model.make_cache(), model.make_cache()
        model.forward_ragged(tokens[:7], [(7, first)])
        hidden = model.forward_ragged(tokens[7:60], [(40, first), (13, second)])
        return np.array(hidden), [first[-1].offset, second[-1].offset]

    whole, offsets = run(2**30)
    pieces, offsets_in_pieces = run(1)
    assert offsets == offsets_in_pieces == [47, 13]
    np.testing.assert_allclose(pieces, whole, atol=2e-6 * np.abs(whole).max())


@pytest.mark.parametrize("queries", [32, 250])
def test_the_peak_of_attention_stays_under_its_budget(raw_config: dict, queries: int) -> None:
    config = KimiConfig.from_dict({**raw_config, "num_attention_heads": 8})
    attention = Attention(config, Rope.of(config))
    keys, cache = 1200, KVCache()
    x = mx.random.normal((queries, config.hidden_size))
    mx.eval(attention.parameters(), x)
    cache.update_and_fetch(mx.random.normal((1, 1, keys, 64)), mx.random.normal((1, 1, keys, 16)))
    mx.eval(cache.state)
    needed = scratch_needed(config, queries, keys + queries, element_bytes=4)
    held = attention_bytes(config, queries, keys + queries, element_bytes=4)
    assert held < needed
    for budget in (needed, needed + (8 << 20)):
        attention.scratch_bytes = budget
        cache.offset = keys
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(attention(x, mx.arange(keys, keys + queries), [Span(1, queries, "causal")], [cache]))
        assert mx.get_peak_memory() - before <= budget
