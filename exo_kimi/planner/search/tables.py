"""The cost laws as the solver's tables of whole ticks and bytes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from exo_kimi.errors import UsageError
from exo_kimi.planner.machines.hardware import Machine
from exo_kimi.planner.question import Question
from exo_kimi.planner.search.cost import groups_and_batch
from exo_kimi.planner.search.laws import (
    chunk_flops,
    decode_layer_s,
    draft_chunk_s,
    head_s,
    hop_s,
    missed_bytes,
    prefill_layer_s,
    streamed_s,
    sweep_hit_rate,
)
from exo_kimi.planner.search.solver import INFINITE, Goal, Int64s, SplitProblem
from exo_kimi.planner.streaming import Streaming

TICKS_PER_S = 1_000_000_000  # a layer takes some 100,000 of them
SLOWEST_TICKS = 60 * TICKS_PER_S  # of one layer or hop, so that no sum of them reaches INFINITE


def need_table(question: Question) -> Int64s:
    """(L+1, L+1): bytes that a machine must hold for layers [start, end), as `Question.need` adds them up."""
    model, workload = question.model, question.workload
    cached = [
        model.cache_bytes(layer, layer + 1, tokens=workload.kv_tokens, sequences=workload.concurrency)
        for layer in range(model.layers)
    ]
    each = np.array(model.layer_bytes, np.int64) + np.array(cached, np.int64)
    if not workload.ends_everywhere:  # exo's own engine holds routers as they are stored
        each += np.array(model.widened_bytes, np.int64)
    table = _ranges(each)
    ends = model.embedding_bytes + model.head_bytes if workload.ends_everywhere else 0
    table += question.scratch_bytes + workload.reserve_bytes + ends
    table[0, :] += workload.server_bytes + model.vision_bytes
    if not workload.ends_everywhere:
        table[0, :] += model.embedding_bytes
        table[:, question.layers] += model.head_bytes
    if question.draft is not None:
        head = question.draft
        table += np.array([question.features_bytes(end) for end in range(question.layers + 1)], np.int64)[None, :]
        table[:, question.layers] += workload.kv_tokens * head.kv_token_bytes
        table[:, question.layers] += np.array(
            [head.weights_on(start, embedding_bytes=model.embedding_bytes) for start in range(question.layers + 1)],
            np.int64,
        )
    return table


def slot_table(question: Question, machine: Machine) -> Int64s:
    """(L+1, L+1): slots a layer that the machine has room for, as `Question.slots` counts them; 0 where it holds all experts, or
    cannot hold the range in any way."""
    need, model = need_table(question), question.model
    if question.streaming is None or not question.streaming.ssd_bytes_per_s(machine):
        return np.zeros_like(need)
    slot_bytes = _ranges(np.array(model.expert_slot_bytes, np.int64))
    free = machine.limit_bytes - need + _ranges(np.array(model.expert_bytes, np.int64))
    streams = (need > machine.limit_bytes) & (slot_bytes > 0) & (free > 0) & _proper(question.layers)
    return np.where(streams, free // np.maximum(slot_bytes, 1), 0)


def least_need_table(question: Question, machine: Machine) -> Int64s:
    """(L+1, L+1): the least that the machine must hold: everything, or one slot a layer where it can stream."""
    need, model = need_table(question), question.model
    if question.streaming is None or not question.streaming.ssd_bytes_per_s(machine):
        return need
    slots = np.array(model.expert_slot_bytes, np.int64)
    return need - _ranges(np.array(model.expert_bytes, np.int64)) + _ranges(slots)


def split_problem(question: Question, *, stages: int = 0) -> SplitProblem:
    """The tables of a question's objective.

    Args:
        question: see `goal_for` for how total and peak make the value of its objective.
        stages: exact number of stages; needed for `throughput`, where the batch of a group depends on it.
    """
    model, workload, objective = question.model, question.workload, question.objective
    batch = groups_and_batch(stages or 1, workload.concurrency)[1] if objective == "throughput" else 1
    decodes = 0 if objective == "ttft" else 1
    if objective == "request":
        decodes = workload.new_tokens - 1
    chunks = objective in ("request", "ttft")
    tokens, keys, cached = workload.chunk_tokens, workload.mean_prompt_keys, workload.mean_cached_tokens
    flops = [
        chunk_flops(model.config, layer, tokens=tokens, keys=keys) for layer in range(model.layers if chunks else 0)
    ]
    need, counts = need_table(question), [model.experts(layer) for layer in range(model.layers)]

    @cache
    def tables_of(kind: tuple[object, ...]) -> tuple[Int64s, Int64s]:
        machine = next(m for m in question.machines if m.kind == kind)
        slots = slot_table(question, machine)
        decode_s = [
            decode_layer_s(model, machine, layer, batch=batch, cached_tokens=cached) for layer in range(model.layers)
        ]
        decode = _per_layer(decode_s)
        if question.streaming is not None and slots.any():
            rates = {n: question.streaming.hit_rate(slots.astype(np.float64), n) for n in set(counts)}
            missed = [missed_bytes(model, layer, tokens=batch, hit_rate=rates[n]) for layer, n in enumerate(counts)]
            decode = _with_reads(question.streaming, machine, slots, decode, decode_s, missed, ahead=False)
        total, peak = decodes * decode, decode if objective == "throughput" else 0 * decode
        if chunks:
            chunk_s = [
                prefill_layer_s(model, machine, layer, tokens=tokens, flops=flops[layer])
                for layer in range(model.layers)
            ]
            chunk = _per_layer(chunk_s)
            if question.streaming is not None and slots.any():
                rates = {n: sweep_hit_rate(slots.astype(np.float64), n) for n in set(counts)}
                missed = [
                    missed_bytes(model, layer, tokens=tokens, hit_rate=rates[n]) for layer, n in enumerate(counts)
                ]
                chunk = _with_reads(question.streaming, machine, slots, chunk, chunk_s, missed, ahead=True)
            if question.draft is not None:
                chunk[:, model.layers] += _ticks(draft_chunk_s(question.draft, machine, tokens))
            total, peak = total + chunk, chunk
        head = _ticks(head_s(model, machine))
        total[:, model.layers] += (decodes + (1 if chunks else 0)) * head
        if objective == "throughput":
            peak[:, model.layers] += head
        fits = (need <= machine.limit_bytes) | (slots > 0)
        return np.where(fits & _proper(model.layers), total, INFINITE), peak

    def with_features(machine: Machine, total: Int64s, peak: Int64s) -> tuple[Int64s, Int64s]:
        """Both, where the boundary behind a range carries features of a draft head: more time, and no peak below the hop. It
        is that of the machine's fastest link, for which machine is next is not known here."""
        draft, others = question.draft, [m for m in question.machines if m is not machine]
        if draft is None or not others:
            return total, peak
        more, least = (np.zeros(model.layers + 1, np.int64) for _ in range(2))
        for end in range(1, model.layers):
            count = draft.features_before(end)
            steps, sweeps = (
                (_fastest(question, machine, others, n, count), _fastest(question, machine, others, n, 0))
                for n in (batch, tokens)
            )
            more[end] = decodes * (steps[0] - steps[1]) + (sweeps[0] - sweeps[1] if chunks else 0)
            least[end] = sweeps[0] if chunks else steps[0] if objective == "throughput" else 0
        return np.where(total < INFINITE, total + more, total), np.maximum(peak, least)

    pairs = [with_features(machine, *tables_of(machine.kind)) for machine in question.machines]

    def hop(one: Machine, other: Machine) -> tuple[int, int]:
        step = _ticks(hop_s(question, one, other, batch))
        chunk = _ticks(hop_s(question, one, other, tokens)) if chunks else 0
        return decodes * step + chunk, chunk if chunks else (step if objective == "throughput" else 0)

    hops = [[(0, 0) if one is other else hop(one, other) for other in question.machines] for one in question.machines]
    hop_total = _only_in_order(question, np.array([[cost[0] for cost in row] for row in hops], np.int64))
    hop_peak = np.array([[cost[1] for cost in row] for row in hops], np.int64)
    return SplitProblem(
        total=np.stack([pair[0] for pair in pairs]),
        peak=np.stack([pair[1] for pair in pairs]),
        hop_total=hop_total,
        hop_peak=hop_peak,
        kinds=_kinds(question.machines, hop_total, hop_peak),
        stages=len(question.order) or stages,
    )


def _fastest(question: Question, machine: Machine, others: Sequence[Machine], tokens: float, features: int) -> int:
    """Ticks of a hop from a machine, over the best of its links."""
    return _ticks(min(hop_s(question, machine, other, tokens, features=features) for other in others))


def shortage_problem(question: Question) -> SplitProblem:
    """Every range allowed, at the cost of the bytes by which it is over the machine's limit."""
    machines = question.machines
    over = np.stack([np.maximum(least_need_table(question, m) - m.limit_bytes, 0) for m in machines])
    nothing = np.zeros((len(machines), len(machines)), np.int64)
    hops = _only_in_order(question, nothing)
    return SplitProblem(
        total=np.where(_proper(question.layers), over, INFINITE),
        peak=over,
        hop_total=hops,
        hop_peak=nothing,
        kinds=_kinds(machines, hops, nothing),
        stages=len(question.order),
    )


def goal_for(question: Question, *, stages: int = 1) -> Goal:
    """How total and peak (ticks) make the value of a split, which is least for the best one."""
    workload = question.workload
    if question.objective == "latency":
        return lambda total, peak: total
    if question.objective == "throughput":
        groups = groups_and_batch(stages, workload.concurrency)[0]
        return lambda total, peak: max(groups * peak, total)
    waiting = workload.chunks - 1
    return lambda total, peak: total + waiting * peak


def _ticks(seconds: float) -> int:
    ticks = round(seconds * TICKS_PER_S)
    if ticks > SLOWEST_TICKS:
        raise UsageError(
            "a machine or link is too slow to plan with",
            expected="a layer or hop of at most a minute",
            found=f"{seconds:.0f} s",
            fix="check bandwidth, prefill speed and latency in the cluster file",
        )
    return ticks


def _per_layer(seconds: Sequence[float]) -> Int64s:
    return _ranges(np.array([_ticks(each_s) for each_s in seconds], np.int64))


def _with_reads(
    streaming: Streaming,
    machine: Machine,
    slots: Int64s,
    held: Int64s,
    held_s: Sequence[float],
    missed: Sequence[NDArray[np.float64]],
    *,
    ahead: bool,
) -> Int64s:
    """(L+1, L+1) ticks of ranges, with their layers' reads where they are streamed.

    Args:
        streaming: hit rates and the end of the band.
        machine: that reads.
        slots: of each range.
        held: ticks of the ranges with every expert in memory.
        held_s: seconds of each layer so.
        missed: (L+1, L+1) bytes that each layer reads as part of each range.
        ahead: see `laws.streamed_s`.
    """
    total = np.zeros(slots.shape)
    for layer, (each_s, size) in enumerate(zip(held_s, missed, strict=True)):
        ranges = (slice(layer + 1), slice(layer + 1, None))
        if not size.any():
            total[ranges] += each_s
            continue
        seconds = streamed_s(streaming, machine, compute_s=each_s, read_bytes=size[ranges], ahead=ahead)
        _ticks(float(np.where(slots[ranges] > 0, seconds, 0.0).max(initial=0.0)))
        total[ranges] += np.where(size[ranges] > 0, seconds, each_s)
    return np.where(slots > 0, np.rint(total * TICKS_PER_S).astype(np.int64), held)


def _ranges(each: Int64s) -> Int64s:
    """(L+1, L+1) sums over [start, end); negative where end is before start."""
    sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(each)])
    ranges: Int64s = sums[None, :] - sums[:, None]
    return ranges


def _only_in_order(question: Question, hop_total: Int64s) -> Int64s:
    """The costs of boundaries, without those that the asked-for order does not have."""
    if not question.order:
        return hop_total
    place = [question.order.index(machine.name) for machine in question.machines]
    follows = np.array([[other == one + 1 for other in place] for one in place])
    return np.where(follows, hop_total, INFINITE)


def _proper(layers: int) -> NDArray[np.bool_]:
    steps = np.arange(layers + 1)
    proper: NDArray[np.bool_] = steps[:, None] < steps[None, :]
    return proper


def _kinds(machines: Sequence[Machine], hop_total: Int64s, hop_peak: Int64s) -> tuple[int, ...]:
    """Equal numbers for machines that are alike in themselves and in their links to every other."""

    def alike(i: int, j: int) -> bool:
        others = [k for k in range(len(machines)) if k not in (i, j)]
        return machines[i].kind == machines[j].kind and all(
            table[i, j] == table[j, i]
            and bool((table[i, others] == table[j, others]).all())
            and bool((table[others, i] == table[others, j]).all())
            for table in (hop_total, hop_peak)
        )

    return tuple(next(j for j in range(i + 1) if j == i or alike(i, j)) for i in range(len(machines)))
