"""Restarts: at once, then ever slower, and never given up for good."""

from __future__ import annotations

from itertools import pairwise

from exo_kimi.runtime.cluster.restarts import GIVE_UP_AFTER, SLOW_RETRY_S, Restarts


def test_the_first_try_comes_at_once_and_further_ones_ever_later() -> None:
    restarts, pauses_s = Restarts(), []
    for _ in range(GIVE_UP_AFTER + 3):
        restarts.count()
        pauses_s.append(restarts.pause_s)
    assert pauses_s[0] == 0
    assert all(before <= after for before, after in pairwise(pauses_s))
    assert pauses_s[GIVE_UP_AFTER - 1 :] == [SLOW_RETRY_S] * 4


def test_requests_wait_until_too_many_faults_in_a_row_and_a_served_step_forgives_all() -> None:
    restarts = Restarts()
    for _ in range(GIVE_UP_AFTER):
        assert restarts.hopeful
        restarts.count()
    assert not restarts.hopeful
    restarts.forget()
    assert restarts.hopeful
