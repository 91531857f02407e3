"""What a step takes, counted: more tokens never take less, and a chunk fits wherever one can."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.scratch import CHUNK_FLOOR, AttentionShape, fitting_chunk, scratch_needed
from exo_kimi.planner.weights.catalog import published_model

K2: KimiConfig = published_model("kimi-k2-thinking").config
queries = st.integers(1, 4096)
cached = st.integers(0, 262_144)
budgets = st.integers(1, 2**34)


@given(queries, cached, st.sampled_from((2, 4)))
def test_a_longer_cache_or_wider_elements_never_take_less(length: int, keys: int, element_bytes: int) -> None:
    needed = scratch_needed(K2, length, length + keys, element_bytes=element_bytes)
    way = AttentionShape.of(K2).prefers_absorbed
    if way(length, length + keys) == way(length, length + keys + 256):
        assert scratch_needed(K2, length, length + keys + 256, element_bytes=element_bytes) >= needed
    assert scratch_needed(K2, length, length + keys, element_bytes=2 * element_bytes) == 2 * needed


@given(queries, cached, budgets)
def test_a_chunk_fits_its_budget_or_is_the_floor(length: int, keys: int, scratch_bytes: int) -> None:
    chunk = fitting_chunk(K2, length, length + keys, scratch_bytes=scratch_bytes)
    assert min(length, CHUNK_FLOOR) <= chunk <= length
    assert chunk <= CHUNK_FLOOR or scratch_needed(K2, chunk, length + keys) <= scratch_bytes
    # Halving stops at the first that fits.
    assert chunk == length or scratch_needed(K2, length, length + keys) > scratch_bytes


def test_a_chunk_of_512_tokens_over_128k_fits_a_gigabyte_of_scratch() -> None:
    assert scratch_needed(K2, 512, 131_072) < 1e9
    assert fitting_chunk(K2, 512, 131_072, scratch_bytes=10**9) == 512
    assert 16 <= fitting_chunk(K2, 512, 131_072, scratch_bytes=300 * 2**20) < 512
