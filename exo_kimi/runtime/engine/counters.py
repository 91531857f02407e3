"""What an engine counted and what happened to it, for /health and /metrics."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from exo_kimi.runtime.engine.admission import Limits
from exo_kimi.runtime.engine.scheduler import Scheduler
from exo_kimi.runtime.engine.sequence import Sequence
from exo_kimi.runtime.engine.speculation import DraftCounts
from exo_kimi.runtime.engine.survival import SurvivalCounts
from exo_kimi.runtime.requests import EngineSnapshot, StageHealth

EVENTS_KEPT = 64


@dataclass(slots=True)
class Counters:
    """Totals since the start, and the last events.

    Args:
        requests: admitted, failed and cancelled ones included.
        failed: ended with an error.
        cancelled: ended because nobody wanted the rest.
        generated: tokens.
        steps: sent to the pipeline.
        epochs: times that the stages became ready.
    """

    requests: int = 0
    failed: int = 0
    cancelled: int = 0
    generated: int = 0
    steps: int = 0
    epochs: int = 0
    events: deque[str] = field(default_factory=lambda: deque(maxlen=EVENTS_KEPT))

    def note(self, text: str) -> None:
        """An event, with the time."""
        self.events.append(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {text}")

    def snapshot(
        self,
        scheduler: Scheduler,
        limits: Limits | None,
        *,
        closed: bool,
        context: int | None,
        stages: tuple[StageHealth, ...],
        sequences: Iterable[Sequence],
        survival: SurvivalCounts,
    ) -> EngineSnapshot:
        """The engine's state now.

        Args:
            scheduler: of the engine.
            limits: None before the stages were ever ready.
            closed: whether the engine was closed.
            context: what it was told to allow, shown until there are limits.
            stages: their health.
            sequences: those with a reader.
            survival: of those that the stages lost.
        """
        current, counts = scheduler.current, scheduler.counts
        kept_tokens = current.prefixes.kept_tokens if current is not None else 0
        drafts = scheduler.drafter.counts if scheduler.drafter is not None else DraftCounts()
        head = scheduler.drafter.head.counts if scheduler.drafter is not None and scheduler.drafter.head else None
        return EngineSnapshot(
            ready=current is not None and not closed,
            stages=stages,
            requests=tuple(s.progress() for s in sorted(sequences, key=lambda s: s.order) if s.state != "ended"),
            context=limits.context if limits else context or 0,
            kv_capacity_tokens=limits.kv_capacity_tokens if limits else 0,
            kv_reserved_tokens=current.ledger.reserved_tokens - kept_tokens if current is not None else 0,
            kv_prefix_tokens=kept_tokens,
            disk_blocks=len(current.prefixes.blocks) if current is not None else 0,
            requests_total=self.requests,
            requests_failed_total=self.failed,
            requests_cancelled_total=self.cancelled,
            requests_interrupted_total=survival.interrupted,
            requests_resumed_total=survival.resumed,
            prompt_tokens_total=counts.prompt_tokens,
            cached_tokens_total=counts.prefixes.cached_tokens,
            resumed_tokens_total=counts.prefixes.resumed_tokens,
            prefix_evictions_total=counts.prefixes.evictions,
            prefix_snapshots=len(current.prefixes.snapshots) if current is not None else 0,
            prefix_snapshots_total=counts.prefixes.snapshots,
            prefix_snapshots_lost_total=counts.prefixes.lost_snapshots,
            generated_tokens_total=self.generated,
            preemptions_total=counts.preemptions,
            steps_total=self.steps,
            restarts_total=max(0, self.epochs - 1),
            draft_tokens_total=drafts.drafted,
            draft_tokens_accepted_total=drafts.accepted,
            head_drafts_by_position=tuple(zip(head.tries, head.hits, strict=True)) if head is not None else (),
            head_proposals_total=head.proposed if head is not None else 0,
            head_judged_total=head.judged if head is not None else 0,
            head_judged_right_total=head.right if head is not None else 0,
            head_undrafted_total=head.undrafted if head is not None else 0,
            decode_bytes_total=drafts.read_bytes,
            decode_bytes_without_drafts_total=drafts.plain_bytes,
            events=tuple(self.events),
        )
