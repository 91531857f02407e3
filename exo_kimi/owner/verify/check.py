"""One thing that was looked at: whether it is as it should be, with the numbers that say so."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from exo_kimi.errors import ExoKimiError

Verdict = Literal["ok", "failed", "skipped"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """What a check found.

    Args:
        verdict: skipped where this machine, or what was given, has nothing to look at.
        found: in one line.
        values: the numbers, by name with their unit.
    """

    verdict: Verdict
    found: str
    values: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, good: bool, found: str, **values: Any) -> CheckResult:
        """A result that is `ok` or `failed`."""
        return cls(verdict="ok" if good else "failed", found=found, values=values)

    @classmethod
    def skipped(cls, why: str) -> CheckResult:
        """A result of nothing."""
        return cls(verdict="skipped", found=why)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyCheck:
    """A check by name, and what it shows."""

    name: str
    shows: str
    run: Callable[[], CheckResult]


def run_check(check: VerifyCheck) -> tuple[CheckResult, float]:
    """Its result and the seconds that it took; whatever it raises is a failure of it and of no other."""
    began_s = time.perf_counter()
    try:
        found = check.run()
    except ExoKimiError as error:
        found = CheckResult(verdict="failed", found=str(error))
    except Exception as error:
        logger.exception("the check %s broke", check.name)
        found = CheckResult(verdict="failed", found=f"{type(error).__name__}: {error}")
    return found, time.perf_counter() - began_s
