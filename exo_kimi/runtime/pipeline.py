"""The contract between the engine and a chain of stages: steps go in, results and changes of state come out.

    engine --send(Step)--> [stage 0 .. stage S-1] --receive()--> StepResult | DiskBlocks | Ready | Failed

`stage.inline.InlinePipeline` (one thread) and `cluster.supervisor.StageCluster` (processes over ZeroMQ) implement it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from exo_kimi.errors import RuntimeFault
from exo_kimi.runtime.requests import StageHealth
from exo_kimi.runtime.steps import HeldCaches, Step, StepResult


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineInfo:
    """What a chain of loaded stages can hold.

    Args:
        context: most positions of one sequence (the model's `max_position_embeddings` or less).
        kv_capacity_tokens: cached tokens of all sequences together, the smallest of all stages.
        cache_step: a sequence's cache grows by this many tokens at a time, so it takes its length rounded up to it.
        vocab_size: rows of the embedding; token ids are below it.
        kv_bytes_per_token: bytes that a cached token takes on the stage where it takes most; 0 when that is not known.
        state_tokens: a sequence of any length takes so many cached tokens' memory beside its own, for states that do not grow.
        recurrent: some layers hold states, which cannot be cut at a token: sequences begin as all of another, or at a snapshot.
        snapshot_tokens: so many cached tokens' memory a snapshot of states takes.
        disk_blocks: blocks of `cache_step` tokens for which every stage has room on its disk.
        snapshot_blocks: so many of them a snapshot takes there.
    """

    context: int
    kv_capacity_tokens: int
    cache_step: int
    vocab_size: int
    kv_bytes_per_token: int = 0
    state_tokens: int = 0
    recurrent: bool = False
    snapshot_tokens: int = 0
    disk_blocks: int = 0
    snapshot_blocks: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """Every stage is loaded, and runs no sequence. Steps carry this `epoch` until the next Failed.

    Args:
        epoch: greater than any before.
        info: what the stages can hold.
        blocks: for each stage the keys of the blocks on its disk, the one that was not used for longest first.
        held: for each stage the caches that it kept of the epoch before; a sequence may begin from those that all of them hold,
            and the others are to be freed.
    """

    epoch: int
    info: PipelineInfo
    blocks: tuple[tuple[str, ...], ...] = ()
    held: tuple[tuple[HeldCaches, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskBlocks:
    """What changed on one stage's disk, see `messages.BlocksChanged`. Each block of a Step's `store` is told of once by
    each stage, unless a Failed comes first."""

    epoch: int
    stage: int
    added: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The chain broke: no sequence runs any more, no result of the epoch follows. While `recovering`, a Ready
    with a greater epoch or another Failed is to come and requests that wait may go on waiting; otherwise it stays down."""

    error: RuntimeFault
    recovering: bool = True


PipelineEvent = StepResult | DiskBlocks | Ready | Failed


class Pipeline(Protocol):
    """A chain of stages. The first event is Ready (or Failed); then each Step sent is answered by exactly one StepResult,
    in the order of sending, also when the step has no segments or none that samples, unless a Failed comes first."""

    @property
    def stages(self) -> int:
        """How many stages there are, which is how many steps may usefully be in flight."""
        ...

    def info(self) -> PipelineInfo | None:
        """The info of the last Ready; None before the first."""
        ...

    def health(self) -> tuple[StageHealth, ...]:
        """What each stage last said, stage 0 first; never waits."""
        ...

    async def send(self, step: Step) -> None:
        """Put a step on its way; returns without waiting for its result.

        Raises:
            RuntimeFault: the stages are not ready, or this step's epoch is over. The step was not carried out and a
                Failed event tells, or has told, the same.
        """
        ...

    async def receive(self) -> PipelineEvent:
        """Wait for the next event. One caller at a time; cancelling the wait loses no event.

        Raises:
            EngineStoppedError: `close` was called.
        """
        ...

    async def close(self) -> None:
        """Stop every stage; idempotent. A pending `receive` raises EngineStoppedError."""
        ...
