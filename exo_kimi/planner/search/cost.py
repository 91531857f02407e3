"""How long a stage, a hop and a request take; each function is one law with its source. It knows nothing of splits' search.

Times are seconds. A stage is a machine and a half-open layer range; stage 0 is the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from exo_kimi.arch.modules import layer_modules
from exo_kimi.planner.machines.cluster import Cluster
from exo_kimi.planner.machines.hardware import Machine
from exo_kimi.planner.weights.bytes import ModelBytes
from exo_kimi.planner.workload import Workload

HIDDEN_ELEMENT_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A machine with its half-open layer range."""

    machine: Machine
    start_layer: int
    end_layer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a split promises. `throughput_tokens_per_s` is of all sequences together, at the workload's concurrency."""

    tpot_s: float
    ttft_s: float
    request_s: float
    throughput_tokens_per_s: float

    @property
    def decode_tokens_per_s(self) -> float:
        """Of one sequence alone."""
        return 1.0 / self.tpot_s


def layer_flops(model: ModelBytes, layer: int, cached_tokens: float) -> float:
    """Floating-point operations of one token in one layer.

    Two per active weight, and 2 T H (d_qk + d_v) for attention over T cached tokens (MLA expanded, as prefill runs it).
    Source: "Training compute-optimal large language models", Hoffmann et al. 2022, appendix F; DeepSeek-V2, MLA.
    """
    config = model.config
    weights = 0.0
    for spec in layer_modules(config, layer):
        share = config.num_experts_per_tok / config.n_routed_experts if spec.kind == "experts" else 1.0
        weights += spec.parameters * share
    attention = cached_tokens * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    return 2.0 * weights + 2.0 * attention


def decode_layer_s(model: ModelBytes, machine: Machine, layer: int, *, batch: int, cached_tokens: int) -> float:
    """One decode step of one layer: (active bytes + KV bytes) / bandwidth + overhead.

    Source: reference/planning.md, laws; the overhead is what eight published points leave over beside bytes / bandwidth.
    """
    read_bytes = model.active_layer_bytes(layer, batch) + batch * cached_tokens * model.kv_layer_bytes
    return read_bytes / machine.bandwidth.number + machine.overhead.number


def head_s(model: ModelBytes, machine: Machine) -> float:
    """The final norm and lm_head of one step, bound by their bytes."""
    return model.head_bytes / machine.bandwidth.number


def prefill_layer_s(model: ModelBytes, machine: Machine, layer: int, workload: Workload, *, flops: float) -> float:
    """One prefill chunk of one layer: the greater of compute and reading the weights that the chunk needs, and overhead.

    Source: roofline, Williams et al. 2009; distinct experts of a chunk as `ModelBytes.active_layer_bytes`.

    Args:
        model: bytes.
        machine: of the stage.
        layer: its index.
        workload: gives the mean length of a chunk.
        flops: of one token, see `layer_flops`.
    """
    tokens = workload.prompt_tokens / workload.chunks
    compute_s = tokens * flops / machine.prefill.number
    memory_s = model.active_layer_bytes(layer, max(1, round(tokens))) / machine.bandwidth.number
    return max(compute_s, memory_s) + machine.overhead.number


def hop_s(model: ModelBytes, cluster: Cluster, one: Machine, other: Machine, tokens: float) -> float:
    """Hidden states of some tokens from one machine to the next: latency + tokens * hidden * 2 / bandwidth."""
    size_bytes = tokens * model.config.hidden_size * HIDDEN_ELEMENT_BYTES
    return cluster.link(one, other).transfer_s(size_bytes)


def decode_stages_s(model: ModelBytes, stages: Sequence[Placed], workload: Workload, *, batch: int = 1) -> list[float]:
    """Seconds of each stage for one decode step of `batch` sequences."""
    cached = workload.mean_cached_tokens
    times = [
        sum(
            decode_layer_s(model, stage.machine, layer, batch=batch, cached_tokens=cached)
            for layer in range(stage.start_layer, stage.end_layer)
        )
        for stage in stages
    ]
    times[-1] += head_s(model, stages[-1].machine)
    return times


def hops_s(model: ModelBytes, cluster: Cluster, stages: Sequence[Placed], tokens: float) -> list[float]:
    """Seconds of each boundary. The token's id comes back in 4 bytes and is not counted."""
    machines = [stage.machine for stage in stages]
    return [hop_s(model, cluster, one, other, tokens) for one, other in pairwise(machines)]


def tpot_s(model: ModelBytes, cluster: Cluster, stages: Sequence[Placed], workload: Workload) -> float:
    """Seconds per generated token of one sequence: stages one after another, and one hop per boundary."""
    return sum(decode_stages_s(model, stages, workload)) + sum(hops_s(model, cluster, stages, 1))


def ttft_s(model: ModelBytes, cluster: Cluster, stages: Sequence[Placed], workload: Workload) -> float:
    """Seconds to the first token: n equal chunks through a pipeline, sum + (n - 1) * slowest, and the head once.

    Source: makespan of a permutation flow shop of identical jobs; hops are stages of it, since they overlap with compute.
    """
    parts = prefill_parts_s(model, cluster, stages, workload)
    return sum(parts) + (workload.chunks - 1) * max(parts) + head_s(model, stages[-1].machine)


def prefill_parts_s(model: ModelBytes, cluster: Cluster, stages: Sequence[Placed], workload: Workload) -> list[float]:
    """Seconds of each stage, then of each hop, for one chunk."""
    mean_position = workload.prompt_tokens / 2
    times = []
    for stage in stages:
        total = 0.0
        for layer in range(stage.start_layer, stage.end_layer):
            flops = layer_flops(model, layer, mean_position)
            total += prefill_layer_s(model, stage.machine, layer, workload, flops=flops)
        times.append(total)
    return times + hops_s(model, cluster, stages, workload.prompt_tokens / workload.chunks)


def groups_and_batch(stages: int, concurrency: int) -> tuple[int, int]:
    """Groups in flight, one per stage while there are sequences, and sequences of a group."""
    groups = min(stages, concurrency)
    return groups, -(-concurrency // groups)


def round_s(model: ModelBytes, cluster: Cluster, stages: Sequence[Placed], workload: Workload) -> float:
    """Seconds in which every sequence gets one token: max(groups * slowest, sum).

    With as many groups as stages the slowest stage never waits; with fewer, a group cannot overtake itself.
    """
    groups, batch = groups_and_batch(len(stages), workload.concurrency)
    parts = decode_stages_s(model, stages, workload, batch=batch) + hops_s(model, cluster, stages, batch)
    return max(groups * max(parts), sum(parts))


def predict(model: ModelBytes, cluster: Cluster, stages: Sequence[Placed], workload: Workload) -> Prediction:
    """Everything that a plan promises for a split."""
    tpot = tpot_s(model, cluster, stages, workload)
    ttft = ttft_s(model, cluster, stages, workload)
    return Prediction(
        tpot_s=tpot,
        ttft_s=ttft,
        request_s=ttft + (workload.new_tokens - 1) * tpot,
        throughput_tokens_per_s=workload.concurrency / round_s(model, cluster, stages, workload),
    )
