"""What a stage holds of one sequence; it knows nothing of the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from exo_kimi.errors import StageError
from exo_kimi.runtime.stage.prefix_kv import trim
from exo_kimi.runtime.stage.sampling import SequenceSampler


@dataclass(slots=True)
class Held:
    """One sequence on this stage: its caches, how many tokens they hold, and on the last stage its sampler. `total` tokens
    were known when it began; `restoring` until its first segment, which may start before the end of what came from disk."""

    caches: list[Any]
    length: int = 0
    drafts: int = 0
    """So many of the last ones are guesses, until the next segment tells."""
    sampler: SequenceSampler | None = field(default=None)
    total: int = 0
    restoring: bool = True

    def settle(self, offset: int) -> None:
        """Drop what is beyond `offset`: guesses that were wrong, or that the leader has no use for."""
        excess = self.length - offset
        for cache in self.caches if excess else ():
            if cache.trim(excess) != excess:
                raise StageError(f"a {type(cache).__name__} cannot give back {excess} tokens")
        if self.sampler is not None:
            self.sampler.begin_run(keep=1 + self.drafts - excess)
        self.length, self.drafts = offset, 0

    def begin_at(self, offset: int) -> None:
        """The first segment comes: another stage may have read less from its disk than this one."""
        if self.restoring and offset < self.length:
            trim(self.caches, offset)
            self.length = offset
        self.restoring = False
