"""Requests to the engine, the tokens that answer them, and the health of the stages: the contract of everything above it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Literal, Protocol, Self, runtime_checkable

from exo_kimi.pictures.picture import Picture

FinishReason = Literal["stop", "length"]
StageState = Literal["starting", "loading", "warming", "ready", "stalled", "dead"]


class TokenConstraint(Protocol):
    """A grammar over token ids. It lives beside the engine's scheduler; stages only see its masks."""

    def mask(self) -> bytes | None:
        """Allowed next tokens as little-endian uint32 words, bit i of word i // 32 is token i; None allows all."""
        ...

    def accept(self, token_id: int) -> None:
        """Advance by a sampled token."""
        ...


@runtime_checkable
class ForkableConstraint(TokenConstraint, Protocol):
    """A grammar that can be followed along tokens that may never come, so that a draft head may guess under it."""

    def fork(self) -> Self:
        """One that stands where this one does; neither moves the other."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one token is chosen from the logits of the last stage; the defaults change nothing.

    Penalties follow OpenAI's formula over generated tokens (`presence_penalty`, `frequency_penalty`); `repetition_penalty`
    follows CTRL (divide positive, multiply negative logits) over prompt and generated tokens. `temperature` 0 is greedy.
    `top_k` 0 and `min_p` 0 are off. Without `seed`, the engine draws one. The n-th generated token of a seed depends on
    nothing but the logits, the seed and n, so batching and preemption cannot change it.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0


@dataclass(frozen=True, slots=True)
class PromptPicture:
    """A picture in a prompt: its vectors stand in the place of `tokens` media tokens from position `start` on."""

    start: int
    tokens: int
    picture: Picture


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedAdapter:
    """An adapter that the stages hold, by the name under which clients ask for it. `fingerprint` is of its files: what was cached
    with it is of use to nobody else."""

    name: str
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One sequence to generate.

    Args:
        request_id: unique among the requests in flight.
        prompt_ids: at least one token id.
        max_tokens: upper bound of generated tokens, cut to what the context has left; None means as many as it holds.
        stop_ids: token ids that end the generation; the id itself is still returned as the last event.
        constraint: a grammar to obey, used by this request only.
        pictures: of the prompt, by position; the stages must have a vision tower.
        adapter: whose weights to generate with; None for those of the base.
        use_prefix_cache: begin from what is cached of other prompts, and leave its own caches for others. Without, every prompt
            token is computed: for measurements.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    max_tokens: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: frozenset[int] = frozenset()
    constraint: TokenConstraint | None = None
    pictures: tuple[PromptPicture, ...] = ()
    adapter: ServedAdapter | None = None
    use_prefix_cache: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """One generated token. `logprob` and `top_logprobs` (id, logprob; best first) come from the raw logits, before
    temperature, penalties and masks, and only when asked for. The last event of a request carries `finish_reason`. `queue_s` is
    how long the request waited for its first step. `accepted_drafts` and `rejected_drafts` count the guesses for it so far."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    queue_s: float = 0.0
    accepted_drafts: int = 0
    rejected_drafts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertHealth:
    """Routed experts of a stage that stay on its disk. All but the first two grow for as long as it holds its layers.

    Args:
        slots: experts that are held, all layers together.
        slot_bytes: what they take in memory.
        hits, misses: experts that passes asked for, each once a pass and layer, by whether they were held.
        evictions: experts that gave way to another.
        read_bytes: from disk.
        read_s: in which something was being read.
        stall_s: in which a pass waited for it.
        failed_reads: that ended a request.
        prefetched_bytes: of `read_bytes`, what was read before anybody asked for it.
        prefetch_used_bytes, prefetch_wasted_bytes: of these, what was asked for then, and what was not.
        prefetch_experts: how many a layer reads ahead now.
    """

    slots: int
    slot_bytes: int
    hits: int
    misses: int
    evictions: int
    read_bytes: int
    read_s: float
    stall_s: float
    failed_reads: int
    prefetched_bytes: int = 0
    prefetch_used_bytes: int = 0
    prefetch_wasted_bytes: int = 0
    prefetch_experts: int = 0

    @property
    def read_bytes_per_s(self) -> float:
        """While something was being read; 0 before."""
        return self.read_bytes / self.read_s if self.read_s else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StageHealth:
    """The last thing that a stage said, and how long ago. `compute_s` is the time that all its steps took since it started."""

    stage: int
    address: str
    state: StageState
    start_layer: int
    end_layer: int
    silent_s: float = 0.0
    pid: int | None = None
    loaded_bytes: int = 0
    total_bytes: int = 0
    weights_bytes: int = 0
    kv_bytes: int = 0
    peak_bytes: int = 0
    sequences: int = 0
    restarts: int = 0
    compute_s: float = 0.0
    last_error: str | None = None
    experts: ExpertHealth | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestProgress:
    """Where one request stands; `prompt_done` counts prompt tokens that went through the last stage, or were cached."""

    request_id: str
    state: Literal["waiting", "prefill", "decode"]
    prompt_tokens: int
    prompt_done: int
    generated_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSnapshot:
    """One consistent look at the engine, for /health, /metrics and progress bars. Counters only grow."""

    ready: bool
    stages: tuple[StageHealth, ...]
    requests: tuple[RequestProgress, ...]
    context: int
    kv_capacity_tokens: int
    kv_reserved_tokens: int
    kv_prefix_tokens: int = 0
    disk_blocks: int = 0
    requests_total: int = 0
    requests_failed_total: int = 0
    requests_cancelled_total: int = 0
    requests_interrupted_total: int = 0
    requests_resumed_total: int = 0
    resumed_tokens_total: int = 0
    """Tokens of interrupted requests, prompts and answers, that were not computed again: caches outlived the fault."""
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0
    prefix_evictions_total: int = 0
    prefix_snapshots: int = 0
    prefix_snapshots_total: int = 0
    prefix_snapshots_lost_total: int = 0
    generated_tokens_total: int = 0
    preemptions_total: int = 0
    steps_total: int = 0
    restarts_total: int = 0
    draft_tokens_total: int = 0
    draft_tokens_accepted_total: int = 0
    head_drafts_by_position: tuple[tuple[int, int], ...] = ()
    """Guesses of a draft head that were verified and those that were right, by position of its chain, those before right."""
    head_proposals_total: int = 0
    head_judged_total: int = 0
    head_judged_right_total: int = 0
    head_undrafted_total: int = 0
    decode_bytes_total: float = 0.0
    decode_bytes_without_drafts_total: float = 0.0
    events: tuple[str, ...] = ()


class TextEngine(Protocol):
    """What the API server needs of an engine."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """Yield the tokens of one request; closing the generator cancels the request on every stage.

        Raises:
            ContextLengthError: the prompt can never fit (raised before the first token; the message has the numbers).
            OverloadedError: the queue is full.
            RuntimeFault: the stages failed while it was in flight.
        """
        ...

    def check(self, request: GenerationRequest) -> int | None:
        """Raise what `generate` would raise before admitting the request.

        Returns:
            How many tokens it may generate, `max_tokens` or fewer; None while the stages have not told their limits.
        """
        ...

    def snapshot(self) -> EngineSnapshot:
        """The engine's state now."""
        ...

    async def close(self) -> None:
        """Fail what is in flight with EngineStoppedError and stop every stage."""
        ...
