"""Ends the answers in progress when exo's API begins anew with another master.

exo's API then forgets the queues that its answers wait on, and they wait for ever: whoever asks while the master's machine falls
asleep would never hear anything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def with_ended_answers(reset: Callable[[Any, Any, Any], None]) -> Callable[[Any, Any, Any], None]:
    """exo's `API.reset`, which closes what it is about to forget: each answer ends as one that exo broke off."""

    @functools.wraps(reset)
    def _reset(self: Any, result_clock: Any, event_receiver: Any) -> None:
        for queue in (*self._text_generation_queues.values(), *self._image_generation_queues.values()):
            queue.close()
        reset(self, result_clock, event_receiver)

    return _reset
