"""The question that a plan answers: a model, the machines it may use, the work it is for, and what shall be least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from exo_kimi.errors import UsageError
from exo_kimi.planner.machines.cluster import Cluster
from exo_kimi.planner.machines.hardware import Machine
from exo_kimi.planner.streaming import Streaming
from exo_kimi.planner.weights.bytes import ModelBytes
from exo_kimi.planner.weights.draft import WAITING_ROWS, DraftBytes
from exo_kimi.planner.workload import Objective, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class StageNeed:
    """Bytes that a machine must hold for its layers, by what they are for.

    Args:
        weight_bytes: all weights, without the routed experts where these are streamed.
        kv_bytes, scratch_bytes, reserve_bytes, server_bytes: beside them.
        expert_slots: of each layer, where its experts are streamed; None where all of them are held.
        expert_cache_bytes: of these slots, over all layers.
    """

    weight_bytes: int
    kv_bytes: int
    scratch_bytes: int
    reserve_bytes: int
    server_bytes: int
    expert_slots: int | None = None
    expert_cache_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All of them."""
        weight_bytes = self.weight_bytes + self.expert_cache_bytes
        return weight_bytes + self.kv_bytes + self.scratch_bytes + self.reserve_bytes + self.server_bytes


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
        streaming: that machines whose layers do not fit may read experts from disk, and at which hit rates; None: all are held.
        draft: the head that guesses on the last stage; None: without one.
    """

    model: ModelBytes
    cluster: Cluster
    workload: Workload
    objective: Objective = "request"
    order: tuple[str, ...] = ()
    streaming: Streaming | None = None
    draft: DraftBytes | None = None

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
        """Hidden state of one token between two stages, in bf16; of Kimi K3 the most that any boundary carries."""
        return self.model.config.hidden_size * self.model.config.link_vectors * 2

    def need(self, start_layer: int, end_layer: int, slots: int | None = None) -> StageNeed:
        """What a machine must hold for layers [start, end); `search.tables.need_table` has the sums of all ranges.

        Args:
            start_layer: first layer.
            end_layer: one past the last.
            slots: experts of each layer that have a slot; None where all are held.
        """
        ends = self.workload.ends_everywhere
        weight_bytes = self.model.weight_bytes(start_layer, end_layer, ends_everywhere=ends)
        if slots is not None:
            weight_bytes -= sum(self.model.expert_bytes[start_layer:end_layer])
        head, last = self.draft, end_layer == self.layers
        tokens, sequences = self.workload.kv_tokens, self.workload.concurrency
        kv_bytes = self.model.cache_bytes(start_layer, end_layer, tokens=tokens, sequences=sequences)
        if head is not None and last:
            weight_bytes += head.weights_on(start_layer, embedding_bytes=self.model.embedding_bytes)
            kv_bytes += self.workload.kv_tokens * head.kv_token_bytes
        return StageNeed(
            expert_slots=slots,
            expert_cache_bytes=0 if slots is None else slots * self.model.slot_bytes(start_layer, end_layer),
            weight_bytes=weight_bytes,
            kv_bytes=kv_bytes,
            scratch_bytes=self.scratch_bytes + self.features_bytes(end_layer),
            reserve_bytes=self.workload.reserve_bytes,
            server_bytes=self.workload.server_bytes if start_layer == 0 else 0,
        )

    def features_bytes(self, end_layer: int) -> int:
        """Features that a stage holds of one prefill step, to the end of its layers: those before it too, which are sent on; and
        on the last stage, those of every sequence that wait for the head."""
        head, workload = self.draft, self.workload
        if head is None:
            return 0
        if end_layer == self.layers:
            rows = workload.prefill_chunk + workload.concurrency * WAITING_ROWS
            return rows * head.feature_token_bytes
        return workload.prefill_chunk * head.features_before(end_layer) * head.feature_bytes

    def slots(self, machine: Machine, start_layer: int, end_layer: int) -> int | None:
        """Slots a layer that a machine has room for beside everything else; None where it holds all experts, and where it cannot
        stream. `search.tables.slot_table` has those of all ranges."""
        if self.streaming is None or not self.streaming.ssd_bytes_per_s(machine):
            return None
        slot_bytes = self.model.slot_bytes(start_layer, end_layer)
        if self.need(start_layer, end_layer).total_bytes <= machine.limit_bytes or not slot_bytes:
            return None
        free_bytes = machine.limit_bytes - self.need(start_layer, end_layer, 0).total_bytes
        return free_bytes // slot_bytes if free_bytes >= slot_bytes else None

    def held(self, machine: Machine, start_layer: int, end_layer: int) -> StageNeed:
        """What a machine holds of layers [start, end): all of them, or its slots."""
        return self.need(start_layer, end_layer, self.slots(machine, start_layer, end_layer))

    @property
    def resident(self) -> Question:
        """The same question with every expert in memory."""
        return replace(self, streaming=None)

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
