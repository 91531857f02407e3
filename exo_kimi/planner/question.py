"""The question that a plan answers: a model, the machines it may use, the work it is for, and what shall be least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from exo_kimi.errors import UsageError
from exo_kimi.planner.machines.cluster import Cluster
from exo_kimi.planner.machines.hardware import Machine
from exo_kimi.planner.weights.bytes import ModelBytes
from exo_kimi.planner.workload import Objective, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class StageNeed:
    """Bytes that a machine must hold for its layers, by what they are for."""

    weight_bytes: int
    kv_bytes: int
    scratch_bytes: int
    reserve_bytes: int
    server_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of them."""
        return self.weight_bytes + self.kv_bytes + self.scratch_bytes + self.reserve_bytes + self.server_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Which split of a model over machines is best for some work; every function of the planner takes it whole.

    Args:
        model: what is split, byte for byte.
        cluster: machines and links.
        workload: what is timed and kept in memory.
        objective: what shall be least: the time of a request, of a token, of a round, or to the first token.
        order: names of all machines of the cluster, first layers first, where the split must take every one in this order;
            empty leaves which and how to the search.
    """

    model: ModelBytes
    cluster: Cluster
    workload: Workload
    objective: Objective = "request"
    order: tuple[str, ...] = ()

    @property
    def machines(self) -> tuple[Machine, ...]:
        """All that the split may use, by name."""
        return self.cluster.machines

    @property
    def machines_in_order(self) -> tuple[Machine, ...]:
        """As a given split is dealt out: in the order that was asked for, else the largest first."""
        if self.order:
            return tuple(sorted(self.machines, key=lambda machine: self.order.index(machine.name)))
        return tuple(sorted(self.machines, key=lambda machine: (-machine.memory_bytes, machine.name)))

    @property
    def layers(self) -> int:
        """Decoder layers to place."""
        return self.model.layers

    @property
    def scratch_bytes(self) -> int:
        """Peak of a prefill step on every stage, see `Workload.scratch_bytes`."""
        return self.workload.scratch_bytes(self.model.config)

    @property
    def hop_bytes_per_token(self) -> int:
        """Hidden state of one token between two stages, in bf16."""
        return self.model.config.hidden_size * 2

    def need(self, start_layer: int, end_layer: int) -> StageNeed:
        """What a machine must hold for layers [start, end); `search.tables.need_table` has the sums of all ranges."""
        ends = self.workload.ends_everywhere
        return StageNeed(
            weight_bytes=self.model.weight_bytes(start_layer, end_layer, ends_everywhere=ends),
            kv_bytes=(end_layer - start_layer) * self.workload.kv_tokens * self.model.kv_layer_bytes,
            scratch_bytes=self.scratch_bytes,
            reserve_bytes=self.workload.reserve_bytes,
            server_bytes=self.workload.server_bytes if start_layer == 0 else 0,
        )

    def with_order(self, names: Sequence[str], *, called: str = "machines") -> Question:
        """The same question for these machines alone, each with a stage, in this order.

        Args:
            names: of machines of the cluster, first layers first.
            called: what an error calls the machines.

        Raises:
            UsageError: a name that is no machine's, or one given twice.
        """
        known = [machine.name for machine in self.machines]
        wrong = next((name for name in names if name not in known or list(names).count(name) > 1), None)
        if wrong is not None or not names:
            raise UsageError(
                f"{wrong} is given twice" if wrong in known else f"no {called[:-1]} is named {wrong}",
                expected=f"different ones of {', '.join(known)}",
                found=",".join(names) or "none",
                where=f"--{called}",
            )
        others = [name for name in known if name not in names]
        return replace(self, cluster=self.cluster.without(*others), order=tuple(names))

    def with_raised_limits(self) -> Question:
        """The same question with every wired limit at its ceiling."""
        return replace(self, cluster=self.cluster.with_raised_limits())

    def with_workload(self, **changes: Any) -> Question:
        """The same question for other work, such as `context=8192`."""
        return replace(self, workload=replace(self.workload, **changes))
