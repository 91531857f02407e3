"""How many slots each layer gets from a budget of bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from exo_kimi.errors import UsageError
from exo_kimi.experts.policies import DEFAULT_POLICY, Policy, make_policy
from exo_kimi.units import format_bytes

Prefetch = Literal["auto", "on", "off"]
"""Whether experts are read that the next layer may ask for: `auto` where that is measured to win."""

PREFETCHES: tuple[Prefetch, ...] = get_args(Prefetch)
DEFAULT_PREFETCH: Prefetch = "auto"


def check_prefetch(name: str) -> None:
    """Refuse what is no way of reading ahead.

    Raises:
        UsageError: with those that there are.
    """
    if name not in PREFETCHES:
        raise UsageError("no such way of reading ahead", expected=", ".join(PREFETCHES), found=repr(name))


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProfile:
    """Experts of one layer, the one that was used most first."""

    layer: int
    experts: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCache:
    """What a stage may hold of its routed experts, and how it reads the others.

    Args:
        budget_bytes: in memory, for all layers together; a layer whose experts all fit is held as ever.
        policy: which expert a layer gives up, by name (see `policies`).
        prefetch: whether experts are read that the next layer may ask for (see `prefetch`).
        reads: through the page cache or past it (see `direct`).
        profile: what `pinned` keeps, of each layer.
    """

    budget_bytes: int
    policy: str = DEFAULT_POLICY
    prefetch: str = DEFAULT_PREFETCH
    reads: str = "auto"
    profile: tuple[LayerProfile, ...] = ()

    def sized(self, budget_bytes: int | None) -> ExpertCache | None:
        """The same with another budget; None where none is set, and all experts are held."""
        return None if budget_bytes is None else replace(self, budget_bytes=budget_bytes)

    def policy_of(self, layer: int, slots: int) -> Policy:
        """A new policy of one layer.

        Raises:
            UsageError: no such policy, or `pinned` without a profile of this layer.
        """
        profile = next((each.experts for each in self.profile if each.layer == layer), ())
        return make_policy(self.policy, slots=slots, profile=profile)


def slots_for(budget_bytes: int, slot_bytes: Mapping[int, int], experts: Mapping[int, int]) -> dict[int, int]:
    """Slots of every layer: as many for each, and of what is left one more for as many as that pays for, the first layers first.

    Args:
        budget_bytes: for all layers together.
        slot_bytes: what an expert takes in memory, by layer.
        experts: of each layer, which gets no more slots.

    Raises:
        UsageError: not one slot for each layer.
    """
    if not slot_bytes:
        return {}
    row_bytes = sum(slot_bytes.values())
    if budget_bytes < row_bytes:
        raise UsageError(
            "the expert cache is too small",
            expected=f"at least {format_bytes(row_bytes)}, one expert for each of {len(slot_bytes)} layers",
            found=format_bytes(budget_bytes),
            where="--expert-cache",
        )
    slots, left_bytes = dict.fromkeys(slot_bytes, 0), budget_bytes
    while partly := [layer for layer in slot_bytes if slots[layer] < experts[layer]]:
        row_bytes = sum(slot_bytes[layer] for layer in partly)
        each = min(left_bytes // row_bytes, *(experts[layer] - slots[layer] for layer in partly))
        if not each:
            break
        slots |= {layer: slots[layer] + each for layer in partly}
        left_bytes -= each * row_bytes
    for layer, size in slot_bytes.items():
        if slots[layer] < experts[layer] and size <= left_bytes:
            slots[layer] += 1
            left_bytes -= size
    return slots


def shares_of(budget_bytes: int, expert_bytes: Sequence[int]) -> list[int]:
    """A machine's budget divided among its stages, by the bytes of their experts; no stage gets more than those.

    Args:
        budget_bytes: of the machine.
        expert_bytes: of each stage's routed experts, in memory.
    """
    total = sum(expert_bytes)
    if total <= budget_bytes:
        return list(expert_bytes)
    return [budget_bytes * size // total for size in expert_bytes]
