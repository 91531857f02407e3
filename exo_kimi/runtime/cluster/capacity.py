"""How many tokens the stages' memory can cache, and whether their weights fit at all; stages of one machine share it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from exo_kimi.errors import StageOutOfMemoryError
from exo_kimi.runtime.protocol.messages import FreeScope, Joined
from exo_kimi.runtime.reserve import reserve_bytes
from exo_kimi.units import format_bytes

_FEWER_LAYERS = (
    "give its machine fewer layers with --split, or raise its limit (macOS: sudo sysctl iogpu.wired_limit_mb=N)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """What a stage reported.

    Args:
        stage: its index.
        host: equal for stages of one machine.
        free_bytes: what it could still allocate (see `messages.Joined`).
        free_scope: whose free memory that is.
        active_bytes: what it holds now.
        weights_bytes: what its weights take, loaded or not.
        kv_bytes_per_token: what a cached token takes.
        waiting_bytes: what features take at most that wait for a draft head.
        state_bytes: what a sequence of any length takes beside.
        snapshot_bytes: what a snapshot of its states takes.
        kept_bytes: what caches of an epoch before take now; they are no less free than if they had been dropped.
    """

    stage: int
    host: str
    free_bytes: int
    free_scope: FreeScope
    active_bytes: int
    weights_bytes: int
    kv_bytes_per_token: int
    waiting_bytes: int = 0
    state_bytes: int = 0
    snapshot_bytes: int = 0
    kept_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCapacity:
    """What the stages can cache of all sequences together.

    Args:
        tokens: cached tokens for which the smallest of all machines has memory.
        state_tokens: so many of them a sequence takes beside its own, for states of one size.
        snapshot_tokens: so many of them a snapshot of its states takes.
    """

    tokens: int
    state_tokens: int
    snapshot_tokens: int = 0


@dataclass(frozen=True, slots=True)
class DiskCapacity:
    """Blocks of tokens for which every stage's disk has room, and how many of them a snapshot takes."""

    blocks: int
    snapshot_blocks: int


@dataclass(frozen=True, slots=True)
class _Budget:
    """Bytes of caches on a machine, and what a token, a sequence and a snapshot take of them."""

    budget_bytes: int
    token_bytes: int
    state_bytes: int
    snapshot_bytes: int


def kv_capacity(
    stages: Sequence[StageMemory], *, kv_bytes: int | None, planned_kv_bytes: Sequence[int] = ()
) -> KvCapacity:
    """What every stage can cache, after its weights are loaded.

    States are counted in tokens, of which the ledger is kept: T tokens, n sequences and m snapshots fit a machine where
    T token_bytes + n state_bytes + m snapshot_bytes is within its budget, and they do wherever
    T + n state_tokens + m snapshot_tokens is within `tokens`: each counts as its share of the budget.

    Args:
        stages: all stages, loaded and empty.
        kv_bytes: a budget for each stage in place of what is free.
        planned_kv_bytes: what a plan keeps for each stage's caches, by its index; no stage takes more. Empty without a plan.

    Raises:
        StageOutOfMemoryError: not one token fits.
    """
    budgets: list[_Budget] = []
    for neighbours in _by_host(stages):
        if kv_bytes is None:
            free_bytes = _host_free_bytes(neighbours)
            budget_bytes = free_bytes - reserve_bytes(free_bytes) - sum(stage.waiting_bytes for stage in neighbours)
            per_token_bytes = sum(stage.kv_bytes_per_token for stage in neighbours)
            state_bytes = sum(stage.state_bytes for stage in neighbours)
            snapshot_bytes = sum(stage.snapshot_bytes for stage in neighbours)
        else:
            budget_bytes = kv_bytes
            per_token_bytes = max(stage.kv_bytes_per_token for stage in neighbours)
            state_bytes = max(stage.state_bytes for stage in neighbours)
            snapshot_bytes = max(stage.snapshot_bytes for stage in neighbours)
        if budget_bytes < per_token_bytes + state_bytes:
            fix = _FEWER_LAYERS if kv_bytes is None else "a larger --kv-bytes"
            short_bytes = per_token_bytes + state_bytes - budget_bytes
            raise _short(neighbours, "caches", short_bytes=short_bytes, free_bytes=budget_bytes, fix=fix)
        budgets.append(_Budget(budget_bytes, per_token_bytes, state_bytes, snapshot_bytes))
    for stage in stages if planned_kv_bytes else ():
        planned_bytes = planned_kv_bytes[stage.stage]
        if planned_bytes < stage.kv_bytes_per_token + stage.state_bytes:
            raise _short(
                [stage],
                "caches",
                short_bytes=stage.kv_bytes_per_token + stage.state_bytes - planned_bytes,
                free_bytes=planned_bytes,
                fix="plan again with a larger --context",
            )
        budgets.append(_Budget(planned_bytes, stage.kv_bytes_per_token, stage.state_bytes, stage.snapshot_bytes))
    return _capacity(budgets)


def _capacity(budgets: Sequence[_Budget]) -> KvCapacity:
    growing = [each.budget_bytes // each.token_bytes for each in budgets if each.token_bytes]
    # Where no layer caches tokens, they are only a measure of sequences.
    tokens = min(growing) if growing else min(each.budget_bytes for each in budgets)
    # A token takes no more of any budget than a share of one in `tokens`, so that in shares all of it adds up.
    states = [-(-tokens * each.state_bytes // max(1, each.budget_bytes)) for each in budgets]
    snapshots = [-(-tokens * each.snapshot_bytes // max(1, each.budget_bytes)) for each in budgets]
    return KvCapacity(tokens=tokens, state_tokens=max(states), snapshot_tokens=max(snapshots))


def disk_capacity(stages: Sequence[Joined]) -> DiskCapacity:
    """What every stage's disk has room for: b blocks and m snapshots wherever b + m snapshot_blocks is within `blocks`."""
    if not all(stage.disk_snapshots for stage in stages):
        return DiskCapacity(0, 1)  # not one prefix could begin there
    blocks = min(stage.disk_blocks for stage in stages)
    return DiskCapacity(blocks, max(-(-blocks // stage.disk_snapshots) for stage in stages))


def check_weights_fit(stages: Sequence[StageMemory]) -> None:
    """Refuse to load what cannot fit.

    Args:
        stages: those that are still to be loaded; `weights_bytes` is what they will take.

    Raises:
        StageOutOfMemoryError: with the machine's stages and the bytes that are missing.
    """
    for neighbours in _by_host(stages):
        free_bytes = _host_free_bytes(neighbours)
        needed_bytes = sum(stage.weights_bytes for stage in neighbours)
        if needed_bytes > free_bytes:
            raise _short(neighbours, "weights", short_bytes=needed_bytes - free_bytes, free_bytes=free_bytes)


def _by_host(stages: Iterable[StageMemory]) -> list[list[StageMemory]]:
    hosts: dict[str, list[StageMemory]] = defaultdict(list)
    for stage in stages:
        hosts[stage.host].append(stage)
    return list(hosts.values())


def _host_free_bytes(neighbours: Sequence[StageMemory]) -> int:
    """A stage that knows Metal's limit and its own share of it does not see what its neighbours hold."""
    active_bytes = sum(stage.active_bytes for stage in neighbours)
    kept_bytes = sum(stage.kept_bytes for stage in neighbours)
    return min(
        stage.free_bytes + stage.kept_bytes - (active_bytes - stage.active_bytes)
        if stage.free_scope == "process"
        else stage.free_bytes + kept_bytes
        for stage in neighbours
    )


def _short(
    neighbours: Sequence[StageMemory], what: str, *, short_bytes: int, free_bytes: int, fix: str = _FEWER_LAYERS
) -> StageOutOfMemoryError:
    names = ("stages " if len(neighbours) > 1 else "stage ") + " and ".join(str(stage.stage) for stage in neighbours)
    return StageOutOfMemoryError(
        f"the {what} of {names} do not fit: {format_bytes(short_bytes)} short ({short_bytes} bytes)",
        stage=neighbours[0].stage,
        expected=f"{format_bytes(free_bytes + short_bytes)} free on {neighbours[0].host}",
        found=format_bytes(free_bytes),
        fix=fix,
    )
