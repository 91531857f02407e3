"""KV capacity: what is free, shared among the stages of a machine, and the weakest machine decides."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exo_kimi.errors import StageOutOfMemoryError
from exo_kimi.runtime.cluster.capacity import StageMemory, check_weights_fit, kv_capacity
from exo_kimi.runtime.reserve import MAX_RESERVE_BYTES

GIB = 2**30
STUDIO = StageMemory(
    stage=0,
    host="studio",
    free_bytes=100 * GIB,
    free_scope="process",
    active_bytes=200 * GIB,
    weights_bytes=0,
    kv_bytes_per_token=50_688,
)
M2 = replace(STUDIO, stage=1, host="m2", free_bytes=10 * GIB, kv_bytes_per_token=19_584)


def test_the_weakest_machine_decides_and_a_reserve_is_kept() -> None:
    assert kv_capacity([STUDIO], kv_bytes=None).tokens == (100 * GIB - MAX_RESERVE_BYTES) // 50_688
    assert kv_capacity([STUDIO, M2], kv_bytes=None).tokens == 9 * GIB // 19_584


def test_stages_of_one_machine_share_what_is_free() -> None:
    both = [replace(M2, free_scope="host"), replace(M2, stage=2, free_scope="host")]
    assert kv_capacity(both, kv_bytes=None).tokens == 9 * GIB // (2 * 19_584)


def test_metal_s_limit_is_charged_with_what_the_neighbour_holds() -> None:
    neighbours = [replace(M2, active_bytes=3 * GIB), replace(M2, stage=2, active_bytes=2 * GIB)]
    assert kv_capacity(neighbours, kv_bytes=None).tokens == int(7 * GIB * 0.9) // (2 * 19_584)


def test_a_budget_is_taken_as_given() -> None:
    assert kv_capacity([STUDIO, M2], kv_bytes=506_880).tokens == 10


@pytest.mark.parametrize("kv_bytes", [None, 1000])
def test_no_room_for_one_token_is_an_error(kv_bytes: int | None) -> None:
    with pytest.raises(StageOutOfMemoryError, match=r"caches of stage 1 do not fit: .* short") as caught:
        kv_capacity([replace(M2, free_bytes=100)], kv_bytes=kv_bytes)
    assert caught.value.fix is not None
    assert ("--kv-bytes" in caught.value.fix) == (kv_bytes is not None)


def test_weights_that_do_not_fit_are_named_with_the_bytes_short() -> None:
    heavy = replace(M2, active_bytes=0, weights_bytes=10 * GIB + 5)
    with pytest.raises(StageOutOfMemoryError, match=r"weights of stage 1 do not fit: 5 B short") as caught:
        check_weights_fit([STUDIO, heavy])
    assert caught.value.stage == 1
    check_weights_fit([STUDIO, replace(heavy, weights_bytes=10 * GIB)])


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=6), st.integers(10**8, 10**12))
def test_the_caches_of_a_machine_never_take_more_than_is_free(per_token_bytes: list[int], free_bytes: int) -> None:
    stages = [
        replace(M2, stage=index, free_scope="host", free_bytes=free_bytes, kv_bytes_per_token=size)
        for index, size in enumerate(per_token_bytes)
    ]
    tokens = kv_capacity(stages, kv_bytes=None).tokens
    assert tokens * sum(per_token_bytes) <= free_bytes


def test_a_plan_s_room_is_kept_whatever_is_free() -> None:
    planned = (50_688 * 40, 19_584 * 30)
    assert kv_capacity([STUDIO, M2], kv_bytes=None, planned_kv_bytes=planned).tokens == 30
    assert kv_capacity([STUDIO, M2], kv_bytes=50_688 * 20, planned_kv_bytes=planned).tokens == 20
    with pytest.raises(StageOutOfMemoryError, match="caches of stage 1 do not fit") as caught:
        kv_capacity([STUDIO, M2], kv_bytes=None, planned_kv_bytes=(50_688, 100))
    assert "plan again" in str(caught.value.fix)
