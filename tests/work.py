"""Work counted, not timed: a busy machine makes everything slower and nothing more."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


def calls_of(function: Callable[[], T], named: str = "") -> tuple[T, int]:
    """What the function gives, and how many functions, Python's and C's, or those of this name, it called in this thread."""
    calls = 0

    def count(frame: FrameType, event: str, called: Any) -> None:
        nonlocal calls
        if event == "call":
            calls += not named or frame.f_code.co_name == named
        elif event == "c_call":
            calls += not named or called.__name__ == named

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        found = function()
    finally:
        sys.setprofile(before)
    return found, calls
