"""Fuzzing of every parser that meets foreign bytes: a look with the other tests, minutes each with FUZZ_S.

    FUZZ_S=300 pytest -m fuzz tests/fuzz --timeout 0

An input that was found to break something becomes a seed, or a test beside the code that it broke.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

Case = TypeVar("Case")
FUZZ_S = float(os.environ.get("FUZZ_S", "0"))
FEW, MANY = 20, 200

# What breaks readers: numbers at and over every limit, texts that no encoding or terminal takes, values of another type.
ODD_NUMBERS = [0, -1, 1, 2**31, 2**63, -(2**63) - 1, 2**64, 10**400, -0.0, 0.5, 1e308, math.inf, -math.inf, math.nan]
ODD_TEXTS = ["", "\x00", "\ud800", "\U0001f642", "é" * 50, "a" * 300, "%s%n{0}", "../../x", "\r\n", "\x1b[31m", "1e999"]
ODD_VALUES: list[Any] = [
    *(None, True, False, *ODD_NUMBERS, *ODD_TEXTS),
    *([], {}, [[]], [None], {"": None}, {"a": {}}, [0] * 50, ["x"] * 50),
]
ODD_BYTES = [b"9" * 30, b"\x00", b"\xff\xfe", b"-", b'"', b"{}", b"[" * 40, b"1e999", b"\n", b"NaN", b"null"]


def mutated_value(seed: Any, draw: random.Random, words: Sequence[str] = ()) -> Any:
    """A copy of a JSON value with one to four things changed, moved, repeated or left out."""
    value = copy.deepcopy(seed)
    for _ in range(draw.randint(1, 4)):
        places = _places(value)
        if not places:
            return copy.deepcopy(draw.choice(ODD_VALUES))
        holder, key = draw.choice(places)
        way, old = draw.randrange(8), holder[key]
        if way == 3:
            del holder[key]
        elif way == 4:
            other, name = draw.choice(places)
            holder[key] = copy.deepcopy(other[name])
        elif way == 5 and type(old) in (int, float):
            huge = old * 10**300 if isinstance(old, int) else old * 1e300
            holder[key] = draw.choice([-old, old + 1, old * 2, huge, str(old)[:400]])
        elif way >= 6 and isinstance(holder, dict):
            name = draw.choice([*words, *map(str, holder), "", "x", "__class__", "\ud800"])
            holder[name] = copy.deepcopy(draw.choice([old, *ODD_VALUES]))
        elif way >= 6:
            holder.insert(key, copy.deepcopy(draw.choice([old, *ODD_VALUES])))
        else:
            holder[key] = copy.deepcopy(draw.choice(ODD_VALUES))
    return value


def mutated_bytes(seed: bytes, draw: random.Random, odd: Sequence[bytes] = ()) -> bytes:
    """A copy with a few bytes changed, cut, repeated or put in; `odd` are more that may be put in."""
    data = bytearray(seed)
    for _ in range(draw.randint(1, 4)):
        start = draw.randint(0, len(data))
        end = min(len(data), start + draw.choice([0, 1, 1, 2, 8, 64]))
        way = draw.randrange(4)
        if way == 0:
            data[start:end] = draw.randbytes(draw.choice([0, 1, 4, 20]))
        elif way == 1:
            data[start:end] = draw.choice([*ODD_BYTES, *odd])
        elif way == 2:
            data[start:start] = data[start:end] * draw.choice([1, 2, 50])
        else:
            del data[draw.choice([start, len(data) // 2]) :]
    return bytes(data)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every list or object in a value, with each of its indices or keys."""
    found: list[tuple[Any, Any]] = []
    stack = [value]
    while stack:
        item = stack.pop()
        keys = list(item) if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ()
        found += [(item, key) for key in keys]
        stack += [item[key] for key in keys]
    return found


class Fuzz:
    """Makes cases and runs a check on them; what the check raises is a finding, and hypothesis makes it small."""

    def run(self, cases: st.SearchStrategy[Case], check: Callable[[Case], None], *, few: int = FEW) -> None:
        """`few` cases, the same ones each time, or cases for FUZZ_S seconds, others each time."""
        until_s = time.monotonic() + FUZZ_S

        @settings(
            max_examples=MANY if FUZZ_S else few,
            deadline=None,
            database=None,
            derandomize=not FUZZ_S,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        )
        @given(cases)
        def one(case: Case) -> None:
            if not FUZZ_S or time.monotonic() < until_s:
                check(case)

        one()
        while time.monotonic() < until_s:
            one()

    def values(self, seeds: Sequence[Any], words: Sequence[str] = ()) -> st.SearchStrategy[Any]:
        """Mutations of JSON values; `words` are keys to add."""
        return st.builds(lambda draw: mutated_value(draw.choice(seeds), draw, words), st.randoms(use_true_random=False))

    def texts(self, seeds: Sequence[Any], words: Sequence[str] = ()) -> st.SearchStrategy[bytes]:
        """JSON of mutated values, some of it damaged as bytes too."""

        def make(draw: random.Random) -> bytes:
            data = json.dumps(mutated_value(draw.choice(seeds), draw, words)).encode()
            return mutated_bytes(data, draw) if draw.random() < 0.3 else data

        return st.builds(make, st.randoms(use_true_random=False))

    def bytes(self, seeds: Sequence[bytes], odd: Sequence[bytes] = ()) -> st.SearchStrategy[bytes]:
        """Mutations of bytes; `odd` are some that break this kind of reader."""
        return st.builds(lambda draw: mutated_bytes(draw.choice(seeds), draw, odd), st.randoms(use_true_random=False))


@pytest.fixture
def fuzz() -> Fuzz:
    """Cases and their runner."""
    return Fuzz()
