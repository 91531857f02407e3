"""When a rank of an instance waits for the others, and when waiting has become pointless.

Only time that this process itself has lived through counts: a process that was frozen, or a machine that slept, wakes up with
clocks that make everybody else look silent.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

TICK_S = 0.5
QUIET_S = 5.0  # ranks beat every second; from here on exo is told that the instance is not ready, and requests wait
HOPELESS_S = 20.0  # after the ranks have lost each other, which takes 30 s of silence: exo is to start the runners anew
_LATE_S = 2.0  # a tick that comes so late was not late because of others
Verdict = Literal["together", "apart", "hopeless"]


class Judge:
    """Judges once a tick; a verdict holds until the next one.

    Args:
        quiet_s: silence after which ranks are apart.
        hopeless_s: time without a connection after which it will not come back.
        clock: seconds.
    """

    def __init__(
        self,
        *,
        quiet_s: float = QUIET_S,
        hopeless_s: float = HOPELESS_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._quiet_s = quiet_s
        self._hopeless_s = hopeless_s
        self._clock = clock
        self._before_s = clock()
        self._lost_s = 0.0
        self._last: Verdict = "together"

    def tick(self, *, connected: bool, silent_s: float) -> Verdict:
        """How it stands now.

        Args:
            connected: whether the ranks have each other.
            silent_s: since the quietest rank was heard.
        """
        now_s = self._clock()
        passed_s, self._before_s = now_s - self._before_s, now_s
        if not connected:
            self._lost_s += min(passed_s, _LATE_S)
            self._last = "hopeless" if self._lost_s > self._hopeless_s else "apart"
            return self._last
        self._lost_s = 0.0
        if passed_s <= _LATE_S or silent_s <= self._quiet_s:  # a late tick cannot tell whose silence it was
            self._last = "apart" if silent_s > self._quiet_s else "together"
        return self._last
