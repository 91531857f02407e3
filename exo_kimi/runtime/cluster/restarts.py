"""When to try again after a fault, and when to stop keeping requests waiting; it counts and knows nothing else."""

from __future__ import annotations

GIVE_UP_AFTER = 5  # faults in a row without a served step: requests are refused from then on, trying goes on
FIRST_BACKOFF_S = 0.5
SLOW_RETRY_S = 10.0


class Restarts:
    """Faults in a row, doubling the pause before each further try."""

    def __init__(self) -> None:
        self._faults = 0

    @property
    def hopeful(self) -> bool:
        """Whether requests may go on waiting."""
        return self._faults < GIVE_UP_AFTER

    @property
    def pause_s(self) -> float:
        """How long to wait before the next try; the first comes at once."""
        if not self.hopeful:
            return SLOW_RETRY_S
        return 0.0 if self._faults <= 1 else FIRST_BACKOFF_S * 2.0 ** (self._faults - 2)

    def count(self) -> None:
        """A fault happened."""
        self._faults += 1

    def forget(self) -> None:
        """A step was served."""
        self._faults = 0
