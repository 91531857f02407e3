"""Which requests outlive a fault of the stages, for how long and how often.

The leader knows a request's prompt and every token so far, and the n-th draw depends on the seed and n only. So a request that
the stages lost is fed to them again, as after a preemption, and goes on with the same tokens. Two bounds keep that from going
on for ever, and both are counted anew with every token that the request gets:

    time    the stages may be away for `survive_s` in all
    tries   it may be part of a step that ends the stages twice; a third time it gets the error. After the second it runs
            before all others and alone, until it has a token: what brought the stages down is then found, and its
            neighbours are not taken for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from exo_kimi.errors import RuntimeFault, StageUnreachableError
from exo_kimi.runtime.engine.sequence import Interruption, Sequence

SURVIVE_S = 300.0
"""What a server takes unless told otherwise: as long as a stage takes to read 500 GB at 2 GB/s, and a minute."""
MOST_SUSPICIONS = 3


@dataclass(slots=True)
class SurvivalCounts:
    """Totals since the start: how often a sequence was interrupted and waited, and went on."""

    interrupted: int = 0
    resumed: int = 0


class Survival:
    """Keeps account of interrupted sequences.

    Args:
        survive_s: see above; 0 lets none survive.
        waiting: the sequences that wait, interrupted or not.
        on_overdue: ends a sequence whose time is up.
    """

    def __init__(
        self, survive_s: float, *, waiting: Callable[[], Iterable[Sequence]], on_overdue: Callable[[Sequence], None]
    ) -> None:
        self.counts = SurvivalCounts()
        self._survive_s = survive_s
        self._waiting = waiting
        self._on_overdue = on_overdue
        self._away_since_s: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def interrupt(self, sequence: Sequence, fault: RuntimeFault, *, in_flight: bool) -> bool:
        """Take note that the stages lost a sequence; whether it may wait for them.

        Args:
            sequence: that touched them.
            fault: what happened.
            in_flight: it was part of a step that was not answered. A link that broke is no step's fault.
        """
        found = sequence.interruption or Interruption(fault=fault)
        found.suspicions += in_flight and not isinstance(fault, StageUnreachableError)
        if self._survive_s <= found.away_s or found.suspicions >= MOST_SUSPICIONS:
            return False
        sequence.interruption = found
        self.counts.interrupted += 1
        return True

    def on_token(self, sequence: Sequence) -> None:
        """A sequence got a token: whatever happened to it is over."""
        if sequence.interruption is not None:
            sequence.interruption = None
            self.counts.resumed += 1

    def on_away(self, fault: RuntimeFault) -> None:
        """The stages are away, or away still, for this reason, which is what a sequence is told when its time is up."""
        now_s = asyncio.get_running_loop().time()
        if self._away_since_s is None:
            self._away_since_s = now_s
        for interruption in self._interruptions():
            interruption.fault = fault
        self._set_timer(now_s)

    def on_back(self) -> None:
        """The stages are ready."""
        if self._away_since_s is not None:
            away_s = asyncio.get_running_loop().time() - self._away_since_s
            for interruption in self._interruptions():
                interruption.away_s += away_s
        self.close()

    def close(self) -> None:
        """Stop waiting for the stages."""
        self._away_since_s = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _interruptions(self) -> list[Interruption]:
        return [sequence.interruption for sequence in self._waiting() if sequence.interruption is not None]

    def _set_timer(self, now_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        since_s = now_s if self._away_since_s is None else self._away_since_s
        left_s = [self._survive_s - each.away_s for each in self._interruptions()]
        if left_s:
            self._timer = asyncio.get_running_loop().call_at(since_s + min(left_s), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        now_s = asyncio.get_running_loop().time()
        since_s = now_s if self._away_since_s is None else self._away_since_s
        for sequence in list(self._waiting()):
            found = sequence.interruption
            if found is not None and found.away_s + now_s - since_s >= self._survive_s:
                self._on_overdue(sequence)
        self._set_timer(now_s)
