"""Restarts: at once, then ever slower, and never given up for good."""

from __future__ import annotations

from itertools import pairwise

from exo_kimi.runtime.cluster.supervisor import GIVE_UP_AFTER, SLOW_RETRY_S, RestartBackoff


def test_the_first_try_comes_at_once_and_further_ones_ever_later() -> None:
    backoff, pauses_s = RestartBackoff(), []
    for _ in range(GIVE_UP_AFTER + 3):
        backoff.on_fault()
        pauses_s.append(backoff.pause_s)
    assert pauses_s[0] == 0
    assert all(before <= after for before, after in pairwise(pauses_s))
    assert pauses_s[GIVE_UP_AFTER - 1 :] == [SLOW_RETRY_S] * 4


def test_requests_wait_until_too_many_faults_in_a_row_and_a_served_step_starts_anew() -> None:
    backoff = RestartBackoff()
    for _ in range(GIVE_UP_AFTER):
        assert backoff.requests_may_wait
        backoff.on_fault()
    assert not backoff.requests_may_wait
    backoff.reset()
    assert backoff.requests_may_wait
