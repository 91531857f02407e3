"""Verdicts about other ranks: only time that this process lived through counts, and what is not true any more is forgotten."""

from __future__ import annotations

from dataclasses import dataclass, field

from exo_kimi.plugin.runner.judge import HOPELESS_S, QUIET_S, TICK_S, Judge, Verdict


@dataclass
class Court:
    """A judge, and the time that passes between ticks."""

    now_s: float = 0.0
    verdicts: list[Verdict] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.judge = Judge(clock=lambda: self.now_s)

    def ticks(self, seconds: float, *, connected: bool = True, silent_s: float = 0.0) -> Verdict:
        for _ in range(int(seconds / TICK_S)):
            self.now_s += TICK_S
            self.verdicts.append(self.judge.tick(connected=connected, silent_s=silent_s))
        return self.verdicts[-1]


def test_ranks_that_hear_each_other_are_together() -> None:
    assert Court().ticks(60, silent_s=1.0) == "together"


def test_a_quiet_rank_is_apart_and_together_again_once_it_is_heard() -> None:
    court = Court()
    assert court.ticks(1, silent_s=QUIET_S + 1) == "apart"
    assert court.ticks(1) == "together"


def test_a_connection_that_stays_lost_is_hopeless_and_not_before() -> None:
    court = Court()
    assert court.ticks(HOPELESS_S - 1, connected=False) == "apart"
    assert court.ticks(2, connected=False) == "hopeless"


def test_a_connection_that_comes_back_begins_anew() -> None:
    court = Court()
    for _ in range(10):
        assert court.ticks(HOPELESS_S - 1, connected=False) == "apart"
        assert court.ticks(1) == "together"


def test_a_process_that_was_frozen_itself_blames_nobody() -> None:
    court = Court()
    court.ticks(5)
    court.now_s += 600
    assert court.ticks(TICK_S, silent_s=600) == "together"
    court.now_s += 600
    assert court.ticks(TICK_S, connected=False, silent_s=600) == "apart"
    assert court.ticks(HOPELESS_S - 4, connected=False) == "apart"


def test_a_late_tick_in_a_silence_does_not_call_the_silent_rank_back() -> None:
    court = Court()
    assert court.ticks(1, silent_s=QUIET_S + 1) == "apart"
    court.now_s += 3.5  # a busy machine
    assert court.ticks(TICK_S, silent_s=QUIET_S + 5) == "apart"
    assert court.ticks(TICK_S, silent_s=0.5) == "together"
