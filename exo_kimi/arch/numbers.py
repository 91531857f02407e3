"""Type checks for the numbers in a config file."""

from __future__ import annotations

import math


def is_number(value: object, kind: type) -> bool:
    """True for a finite number of `kind` (int also accepts 7.0), or for a bool when `kind` is bool."""
    if kind is bool:
        return isinstance(value, bool)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an int beyond every float
        finite = False
    if not finite:
        return False
    return kind is float or value == int(value)
