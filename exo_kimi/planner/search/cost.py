"""What a split costs: seconds of its stages, hops and requests, by the laws of one layer (`laws`).

Times are seconds. A stage is a machine and a half-open layer range; stage 0 is the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from exo_kimi.planner.machines.hardware import Machine
from exo_kimi.planner.question import Question
from exo_kimi.planner.search.laws import (
    chunk_flops,
    decode_layer_s,
    draft_chain_s,
    draft_chunk_s,
    head_s,
    hop_s,
    missed_bytes,
    prefill_layer_s,
    streamed_s,
    sweep_hit_rate,
)
from exo_kimi.planner.split import parse_split
from exo_kimi.planner.streaming import Case, Streaming


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A machine with its half-open layer range."""

    machine: Machine
    start_layer: int
    end_layer: int

    @property
    def layers(self) -> int:
        """How many layers it holds."""
        return self.end_layer - self.start_layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a split promises.

    Args:
        tpot_s: seconds of a token in the middle of the timed request.
        first_tpot_s: of the first token of a context.
        last_tpot_s: of the last one that the context has room for.
        ttft_s: seconds to the first token of the timed request.
        request_s: seconds of the whole request.
        throughput_tokens_per_s: of all sequences together, at the workload's concurrency.
    """

    tpot_s: float
    first_tpot_s: float
    last_tpot_s: float
    ttft_s: float
    request_s: float
    throughput_tokens_per_s: float

    @property
    def decode_tokens_per_s(self) -> float:
        """Of one sequence alone."""
        return 1.0 / self.tpot_s


@dataclass(frozen=True, kw_only=True)  # no slots: what it promises is worked out once
class PlacedSplit:
    """One possible answer to a question: which machine holds which layers, first layers first."""

    question: Question
    stages: tuple[Placed, ...]

    @classmethod
    def given(
        cls, question: Question, split: str | Sequence[int], machines: Sequence[Machine], *, called: str = "machines"
    ) -> PlacedSplit:
        """Layer counts over machines, in their order; `called` is what an error calls them.

        Raises:
            SplitError: they do not place every layer once, or there are more of them than machines.
        """
        ranges = parse_split(split, question.layers, most_stages=len(machines), stages=called)
        placed = zip(machines, ranges, strict=False)
        stages = (Placed(machine=machine, start_layer=start, end_layer=end) for machine, (start, end) in placed)
        return cls(question=question, stages=tuple(stages))

    @property
    def counts(self) -> tuple[int, ...]:
        """Layers of each stage."""
        return tuple(stage.layers for stage in self.stages)

    def slots(self, stage: Placed) -> int | None:
        """Slots a layer of a stage; None where it holds all experts."""
        return self.question.slots(stage.machine, stage.start_layer, stage.end_layer)

    @property
    def streams(self) -> bool:
        """Whether any stage reads experts from disk."""
        return any(self.slots(stage) is not None for stage in self.stages)

    def at(self, case: Case) -> PlacedSplit:
        """The same split at an end of the band of its hit rates and disks; the same where nothing is streamed."""
        streaming = self.question.streaming
        if streaming is None or not self.streams:
            return self
        return replace(self, question=replace(self.question, streaming=replace(streaming, case=case)))

    @cached_property
    def prediction(self) -> Prediction:
        """Everything that a plan promises for it."""
        return predict(self)

    @property
    def objective_s(self) -> float:
        """What the objective minimises, in seconds; for `throughput` the seconds of one round of all sequences."""
        made = self.prediction
        return {
            "request": made.request_s,
            "latency": made.tpot_s,
            "ttft": made.ttft_s,
            "throughput": self.question.workload.concurrency / made.throughput_tokens_per_s,
        }[self.question.objective]


def decode_stages_s(split: PlacedSplit, *, batch: int = 1, cached_tokens: float | None = None) -> list[float]:
    """Seconds of each stage for one decode step of `batch` sequences, each with a cache as in the middle of the timed request
    unless `cached_tokens` says otherwise."""
    question, model = split.question, split.question.model
    cached = question.workload.mean_cached_tokens if cached_tokens is None else cached_tokens
    times = []
    for stage in split.stages:
        slots = split.slots(stage)
        layers = range(stage.start_layer, stage.end_layer)
        held_s = [decode_layer_s(model, stage.machine, n, batch=batch, cached_tokens=cached) for n in layers]
        if question.streaming is not None and slots is not None:
            rates = [question.streaming.hit_rate(float(slots), model.experts(layer)) for layer in layers]
            missed = [
                missed_bytes(model, layer, tokens=batch, hit_rate=rate)
                for layer, rate in zip(layers, rates, strict=True)
            ]
            held_s = _streamed(question.streaming, stage, held_s, missed, ahead=False)
        times.append(sum(held_s))
    times[-1] += head_s(model, split.stages[-1].machine)
    return times


def hops_s(split: PlacedSplit, tokens: float) -> list[float]:
    """Seconds of each boundary, with the features that a draft head behind it is sent. The token's id comes back in 4 bytes and
    is not counted."""
    draft = split.question.draft
    return [
        hop_s(
            split.question,
            one.machine,
            other.machine,
            tokens,
            features=0 if draft is None else draft.features_before(other.start_layer),
        )
        for one, other in pairwise(split.stages)
    ]


def drafted_step_s(split: PlacedSplit, guesses: int) -> float:
    """Seconds of a step of one sequence that verifies so many guesses and makes as many: every stage takes them beside the token,
    and reads each expert that any of them chooses once."""
    tokens, last = guesses + 1, split.stages[-1].machine
    stages_s, hops = decode_stages_s(split, batch=tokens), hops_s(split, tokens)
    return sum(stages_s) + sum(hops) + draft_chain_s(split.question, last, guesses)


def tpot_s(split: PlacedSplit, *, cached_tokens: float | None = None) -> float:
    """Seconds per generated token of one sequence: stages one after another, and one hop per boundary."""
    return sum(decode_stages_s(split, cached_tokens=cached_tokens)) + sum(hops_s(split, 1))


def ttft_s(split: PlacedSplit) -> float:
    """Seconds to the first token: n equal chunks through a pipeline, sum + (n - 1) * slowest, and the head once.

    Source: makespan of a permutation flow shop of identical jobs; hops are stages of it, since they overlap with compute.
    """
    parts = prefill_parts_s(split)
    waiting = split.question.workload.chunks - 1
    return sum(parts) + waiting * max(parts) + head_s(split.question.model, split.stages[-1].machine)


def prefill_parts_s(split: PlacedSplit) -> list[float]:
    """Seconds of each stage, then of each hop, for one chunk."""
    question, model, workload = split.question, split.question.model, split.question.workload
    tokens = workload.chunk_tokens
    times = []
    for stage in split.stages:
        slots = split.slots(stage)
        layers = range(stage.start_layer, stage.end_layer)
        flops = [chunk_flops(model.config, n, tokens=tokens, keys=workload.mean_prompt_keys) for n in layers]
        held_s = [
            prefill_layer_s(model, stage.machine, layer, tokens=tokens, flops=each)
            for layer, each in zip(layers, flops, strict=True)
        ]
        if question.streaming is not None and slots is not None:
            rates = [sweep_hit_rate(float(slots), model.experts(layer)) for layer in layers]
            missed = [
                missed_bytes(model, layer, tokens=tokens, hit_rate=rate)
                for layer, rate in zip(layers, rates, strict=True)
            ]
            held_s = _streamed(question.streaming, stage, held_s, missed, ahead=True)
        times.append(sum(held_s))
    if question.draft is not None:
        times[-1] += draft_chunk_s(question.draft, split.stages[-1].machine, tokens)
    return times + hops_s(split, workload.chunk_tokens)


def read_bytes_per_token(split: PlacedSplit) -> list[float]:
    """Bytes that each stage reads from disk for a token of one sequence; 0 where it holds all experts."""
    question, model = split.question, split.question.model
    totals = []
    for stage in split.stages:
        slots = split.slots(stage)
        if question.streaming is None or slots is None:
            totals.append(0.0)
            continue
        total = 0.0
        for layer in range(stage.start_layer, stage.end_layer):
            rate = question.streaming.hit_rate(float(slots), model.experts(layer))
            total += missed_bytes(model, layer, tokens=1, hit_rate=rate)
        totals.append(total)
    return totals


def _streamed(
    streaming: Streaming, stage: Placed, held_s: Sequence[float], missed: Sequence[float], *, ahead: bool
) -> list[float]:
    """Seconds of a stage's layers with their reads; a dense layer reads nothing."""
    return [
        streamed_s(streaming, stage.machine, compute_s=each_s, read_bytes=size, ahead=ahead) if size else each_s
        for each_s, size in zip(held_s, missed, strict=True)
    ]


def groups_and_batch(stages: int, concurrency: int) -> tuple[int, int]:
    """Groups in flight, one per stage while there are sequences, and sequences of a group."""
    groups = min(stages, concurrency)
    return groups, -(-concurrency // groups)


def round_s(split: PlacedSplit) -> float:
    """Seconds in which every sequence gets one token: max(groups * slowest, sum).

    With as many groups as stages the slowest stage never waits; with fewer, a group cannot overtake itself.
    """
    groups, batch = groups_and_batch(len(split.stages), split.question.workload.concurrency)
    parts = decode_stages_s(split, batch=batch) + hops_s(split, batch)
    return max(groups * max(parts), sum(parts))


def predict(split: PlacedSplit) -> Prediction:
    """Everything that a plan promises for a split."""
    workload = split.question.workload
    tpot, ttft = tpot_s(split), ttft_s(split)
    return Prediction(
        tpot_s=tpot,
        first_tpot_s=tpot_s(split, cached_tokens=1),
        last_tpot_s=tpot_s(split, cached_tokens=workload.context - 1),
        ttft_s=ttft,
        request_s=ttft + (workload.new_tokens - 1) * tpot,
        throughput_tokens_per_s=workload.concurrency / round_s(split),
    )
