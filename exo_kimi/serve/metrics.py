"""What /metrics shows: the engine's own counts, read when asked, and the latencies that the API saw."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from exo_kimi.runtime.requests import EngineSnapshot, StageHealth, StageState

STAGE_STATES = get_args(StageState)
TOKEN_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 30, 60, 300)
QUEUE_BUCKETS_S = (0.001, 0.01, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
LATENCY_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """One server's metrics, in a registry of their own.

    Args:
        snapshot: takes one look at the engine.
    """

    def __init__(self, snapshot: Callable[[], EngineSnapshot]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(snapshot))
        self._http = Counter(
            "exo_kimi_http_requests", "HTTP requests answered", ["path", "status"], registry=self._registry
        )
        self._closed = Counter(
            "exo_kimi_connections_closed",
            "Connections closed before their request reached the API or their answer the client, by reason",
            ["reason"],
            registry=self._registry,
        )
        self._ended = Counter(
            "exo_kimi_api_generations", "Generations that ended, by outcome", ["outcome"], registry=self._registry
        )
        self._ttft = Histogram(
            "exo_kimi_time_to_first_token_seconds",
            "From the start of a generation to its first token",
            buckets=LATENCY_BUCKETS_S,
            registry=self._registry,
        )
        self._between = Histogram(
            "exo_kimi_inter_token_latency_seconds",
            "Between two tokens of one sequence",
            buckets=TOKEN_BUCKETS_S,
            registry=self._registry,
        )
        self._queued = Histogram(
            "exo_kimi_request_queue_time_seconds",
            "From the admission of a sequence to its first step",
            buckets=QUEUE_BUCKETS_S,
            registry=self._registry,
        )
        self._duration = Histogram(
            "exo_kimi_generation_seconds",
            "From the start of a generation to its end",
            buckets=LATENCY_BUCKETS_S,
            registry=self._registry,
        )

    def answered(self, path: str, status: int) -> None:
        """An HTTP request was answered. `path` comes from the routes, never from the client."""
        self._http.labels(path=path, status=str(status)).inc()

    def connection_closed(self, reason: str) -> None:
        """A connection was closed by the server; `reason` is one of `connections.ClosedReason`."""
        self._closed.labels(reason=reason).inc()

    def first_token(self, seconds: float) -> None:
        """As `generation.Observer`."""
        self._ttft.observe(seconds)

    def queued(self, seconds: float) -> None:
        """As `generation.Observer`."""
        self._queued.observe(seconds)

    def between_tokens(self, seconds: float) -> None:
        """As `generation.Observer`."""
        self._between.observe(seconds)

    def finished(self, outcome: str, seconds: float) -> None:
        """As `generation.Observer`."""
        self._ended.labels(outcome=outcome).inc()
        self._duration.observe(seconds)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)


@dataclass(frozen=True, slots=True)
class _EngineCollector(Collector):
    """Reads the engine at every scrape, so nothing is counted twice."""

    snapshot: Callable[[], EngineSnapshot]

    def collect(self) -> Iterator[Metric]:
        snapshot = self.snapshot()
        yield from _counters(snapshot)
        yield from _gauges(snapshot)
        yield from _stage_metrics(snapshot.stages)
        yield from _expert_metrics(snapshot.stages)
        yield from _prefill_metrics(snapshot)


def _counters(snapshot: EngineSnapshot) -> Iterator[Metric]:
    for name, text, value in (
        ("requests", "Sequences that the engine admitted", snapshot.requests_total),
        ("requests_failed", "Sequences that failed", snapshot.requests_failed_total),
        ("requests_cancelled", "Sequences whose client went away or had enough", snapshot.requests_cancelled_total),
        ("requests_interrupted", "Times that a sequence waited for failed stages", snapshot.requests_interrupted_total),
        ("requests_resumed", "Times that such a sequence went on", snapshot.requests_resumed_total),
        ("resumed_tokens", "Tokens of such sequences that stages or disks still cached", snapshot.resumed_tokens_total),
        ("prompt_tokens", "Prompt tokens", snapshot.prompt_tokens_total),
        ("cached_prompt_tokens", "Prompt tokens that were found in a cache", snapshot.cached_tokens_total),
        ("prefix_evictions", "Caches of ended sequences dropped for want of memory", snapshot.prefix_evictions_total),
        ("prefix_snapshots", "Snapshots of recurrent states that were taken", snapshot.prefix_snapshots_total),
        ("prefix_snapshots_lost", "Snapshots that a disk had lost", snapshot.prefix_snapshots_lost_total),
        ("generated_tokens", "Generated tokens", snapshot.generated_tokens_total),
        ("preemptions", "Sequences put back for want of KV memory", snapshot.preemptions_total),
        ("steps", "Forward passes", snapshot.steps_total),
        ("draft_tokens", "Tokens that were guessed and sent to be verified", snapshot.draft_tokens_total),
        ("draft_tokens_accepted", "Guesses that were right: steps saved", snapshot.draft_tokens_accepted_total),
        ("head_proposals", "Tokens that the draft head guessed", snapshot.head_proposals_total),
        ("head_judged", "Tokens that it did not have to guess, and was measured by", snapshot.head_judged_total),
        ("head_judged_right", "Of those, tokens that it would have guessed", snapshot.head_judged_right_total),
        ("head_undrafted", "Sequences that it could not follow to their end", snapshot.head_undrafted_total),
        ("decode_bytes", "Estimated bytes read by steps with decoding", snapshot.decode_bytes_total),
        (
            "decode_bytes_without_drafts",
            "Estimated bytes that the same tokens would have read without guesses",
            snapshot.decode_bytes_without_drafts_total,
        ),
        ("stage_restarts", "Restarts of stages", snapshot.restarts_total),
    ):
        yield CounterMetricFamily(f"exo_kimi_{name}", text, value=value)
    for name, text, column in (
        ("head_drafts", "Guesses of the draft head that were verified, those before them right", 0),
        ("head_drafts_accepted", "Of those, guesses that were right", 1),
    ):
        family = CounterMetricFamily(f"exo_kimi_{name}", text, labels=["position"])
        for place, counts in enumerate(snapshot.head_drafts_by_position, start=1):
            family.add_metric([str(place)], counts[column])
        if snapshot.head_drafts_by_position:
            yield family


def _gauges(snapshot: EngineSnapshot) -> Iterator[Metric]:
    for name, text, value in (
        ("ready", "1 when every stage is ready", float(snapshot.ready)),
        ("context_tokens", "Most positions of one sequence", snapshot.context),
        ("kv_capacity_tokens", "Cached tokens that fit, all sequences together", snapshot.kv_capacity_tokens),
        ("kv_reserved_tokens", "Cached tokens that sequences hold", snapshot.kv_reserved_tokens),
        ("kv_prefix_tokens", "Cached tokens of ended sequences, kept until wanted", snapshot.kv_prefix_tokens),
        ("prefix_snapshots_held", "Snapshots of recurrent states in memory", snapshot.prefix_snapshots),
        ("prefix_disk_blocks", "Blocks of cached tokens on every stage's disk", snapshot.disk_blocks),
    ):
        yield GaugeMetricFamily(f"exo_kimi_{name}", text, value=value)
    states = GaugeMetricFamily("exo_kimi_requests_in_flight", "Sequences by state", labels=["state"])
    for state in ("waiting", "prefill", "decode"):
        states.add_metric([state], sum(request.state == state for request in snapshot.requests))
    yield states


def _stage_metrics(stages: tuple[StageHealth, ...]) -> Iterator[Metric]:
    state = GaugeMetricFamily("exo_kimi_stage_state", "1 for the state that a stage is in", labels=["stage", "state"])
    for stage in stages:
        for name in STAGE_STATES:
            state.add_metric([str(stage.stage), name], float(stage.state == name))
    yield state
    for name, field, text in (
        ("silent_seconds", "silent_s", "Since a stage was last heard"),
        ("loaded_bytes", "loaded_bytes", "Bytes of weights read so far"),
        ("total_bytes", "total_bytes", "Bytes of weights to read"),
        ("weights_bytes", "weights_bytes", "Resident bytes of weights"),
        ("kv_bytes", "kv_bytes", "Bytes of KV caches"),
        ("peak_bytes", "peak_bytes", "Most bytes that MLX held at once"),
        ("sequences", "sequences", "Sequences with a cache"),
        ("restarts", "restarts", "Restarts of this stage"),
    ):
        family = GaugeMetricFamily(f"exo_kimi_stage_{name}", text, labels=["stage"])
        for stage in stages:
            family.add_metric([str(stage.stage)], getattr(stage, field))
        yield family


def _expert_metrics(stages: tuple[StageHealth, ...]) -> Iterator[Metric]:
    """Of the stages whose routed experts stay on disk. A stage that loads anew counts from 0 again."""
    each = [(str(stage.stage), stage.experts) for stage in stages if stage.experts is not None]
    for name, field, text in (
        ("hits", "hits", "Experts that a pass found in memory"),
        ("misses", "misses", "Experts that a pass had to read"),
        ("evictions", "evictions", "Experts that gave way to another"),
        ("read_bytes", "read_bytes", "Bytes of experts read from disk"),
        ("read_seconds", "read_s", "Time in which experts were being read"),
        ("stall_seconds", "stall_s", "Time in which a pass waited for an expert"),
        ("failed_reads", "failed_reads", "Reads that ended a request"),
        ("prefetched_bytes", "prefetched_bytes", "Bytes read before a pass asked for them"),
        ("prefetch_used_bytes", "prefetch_used_bytes", "Of these, bytes that a pass asked for then"),
        ("prefetch_wasted_bytes", "prefetch_wasted_bytes", "Of these, bytes that none asked for"),
    ):
        family = CounterMetricFamily(f"exo_kimi_expert_{name}", text, labels=["stage"])
        for stage, experts in each:
            family.add_metric([stage], getattr(experts, field))
        yield family
    for name, field, text in (
        ("slots", "slots", "Experts that are held, all layers together"),
        ("slot_bytes", "slot_bytes", "Bytes of memory for experts"),
        ("prefetch_experts", "prefetch_experts", "Experts that a layer reads ahead now"),
        ("read_bytes_per_second", "read_bytes_per_s", "Mean speed of reading experts"),
    ):
        gauge = GaugeMetricFamily(f"exo_kimi_expert_{name}", text, labels=["stage"])
        for stage, experts in each:
            gauge.add_metric([stage], getattr(experts, field))
        yield gauge


def _prefill_metrics(snapshot: EngineSnapshot) -> Iterator[Metric]:
    """Long prompts on their way, so that a wait can be seen to move."""
    done = GaugeMetricFamily("exo_kimi_prefill_done_tokens", "Prompt tokens done of a request", labels=["request"])
    total = GaugeMetricFamily("exo_kimi_prefill_total_tokens", "Prompt tokens of a request", labels=["request"])
    for request in snapshot.requests:
        if request.state == "prefill":
            done.add_metric([request.request_id], request.prompt_done)
            total.add_metric([request.request_id], request.prompt_tokens)
    yield done
    yield total
