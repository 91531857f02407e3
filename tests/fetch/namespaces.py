"""Two network namespaces of this machine as two machines, or a skipped test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from exo_kimi.bench.claims.share.namespaces import Namespace as Machine
from exo_kimi.bench.claims.share.namespaces import two_namespaces
from exo_kimi.errors import MachineError

__all__ = ["Machine", "TwoMachines", "two_machines"]


@dataclass(frozen=True)
class TwoMachines:
    """Both ends of the cable."""

    one: Machine
    other: Machine

    def shape(self, rate: str | None) -> None:
        """The cable's rate as `tc` writes it, both ways; None is as fast as the machine."""
        for end in (self.one, self.other):
            end.shape(rate)


@contextmanager
def two_machines(root: Path, *, rate: str | None = None) -> Iterator[TwoMachines]:
    """Make them, with the cable's rate as `tc` writes it; skipped where a test may not."""
    with ExitStack() as stack:
        try:
            ends = stack.enter_context(two_namespaces(root, rate=rate))
        except MachineError as error:
            pytest.skip(str(error))
        yield TwoMachines(*ends)
