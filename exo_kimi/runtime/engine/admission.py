"""Request admission and KV-token accounting: a prompt that can never fit is refused, max_tokens is cut to what is left."""

from __future__ import annotations

import math
from dataclasses import dataclass

from exo_kimi.errors import ContextLengthError, RequestError
from exo_kimi.runtime.pipeline import PipelineInfo
from exo_kimi.runtime.requests import GenerationRequest, SamplingParams

MAX_TOP_LOGPROBS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one sequence may be: most positions, and most cached tokens."""

    context: int
    kv_capacity_tokens: int
    cache_step: int
    vocab_size: int
    state_tokens: int = 0
    snapshot_tokens: int = 0

    @classmethod
    def of(cls, info: PipelineInfo, *, context: int | None = None) -> Limits:
        """The limits of a pipeline, with `context` as a lower bound for its positions when it is given."""
        return cls(
            context=info.context if context is None else min(context, info.context),
            kv_capacity_tokens=info.kv_capacity_tokens,
            cache_step=info.cache_step,
            vocab_size=info.vocab_size,
            state_tokens=info.state_tokens,
            snapshot_tokens=info.snapshot_tokens,
        )

    def rounded(self, tokens: int) -> int:
        """Cached tokens' memory that a sequence of `tokens` tokens takes: whole allocation steps, and its states."""
        return -(-tokens // self.cache_step) * self.cache_step + self.state_tokens

    def new_tokens(self, request: GenerationRequest) -> int:
        """How many tokens the request may generate: its `max_tokens`, an upper limit, cut to what is left behind the prompt.

        Raises:
            ContextLengthError: the prompt leaves no token, whatever else runs.
        """
        prompt = len(request.prompt_ids)
        # The last generated token is never fed back, so it takes a position but no cache.
        whole_kv = max(0, self.kv_capacity_tokens - self.state_tokens) // self.cache_step * self.cache_step
        room_in_context = self.context - prompt
        room_in_kv = whole_kv + 1 - prompt
        room = min(room_in_context, room_in_kv)
        if room >= 1:
            return room if request.max_tokens is None else min(request.max_tokens, room)
        limit = "the context" if room_in_context <= room_in_kv else "the KV memory"
        size = self.context if room_in_context <= room_in_kv else whole_kv
        longest = prompt + room - 1
        raise ContextLengthError(
            f"the prompt has {prompt} tokens, and {limit} holds {size}",
            param="messages",
            code="context_length_exceeded",
            expected=f"a prompt of at most {longest} tokens, which leaves one for the answer",
            found=f"{prompt} tokens",
            fix="a shorter conversation, or a larger --context" if limit == "the context" else "a shorter conversation",
        )


def check_request(request: GenerationRequest, limits: Limits) -> int:
    """How many tokens the request may generate, after every field was checked.

    Raises:
        RequestError: a field that no stage could carry out.
        ContextLengthError: its prompt can never fit.
    """
    if not request.prompt_ids:
        raise RequestError("the prompt has no tokens", param="messages")
    if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < limits.vocab_size:
        raise RequestError(
            "a prompt token is outside the vocabulary",
            param="prompt",
            expected=f"0 to {limits.vocab_size - 1}",
            found=f"{min(request.prompt_ids)} to {max(request.prompt_ids)}",
        )
    if request.max_tokens is not None and request.max_tokens < 1:
        raise RequestError("max_tokens must be at least 1", param="max_tokens", found=request.max_tokens)
    _check_sampling(request.sampling, limits.vocab_size)
    return limits.new_tokens(request)


def _check_sampling(params: SamplingParams, vocab_size: int) -> None:
    ranges: tuple[tuple[str, float, float, float], ...] = (
        ("temperature", params.temperature, 0.0, math.inf),
        ("top_p", params.top_p, 0.0, 1.0),
        ("top_k", params.top_k, 0, 2**31 - 1),
        ("min_p", params.min_p, 0.0, 1.0),
        ("presence_penalty", params.presence_penalty, -math.inf, math.inf),
        ("frequency_penalty", params.frequency_penalty, -math.inf, math.inf),
        ("repetition_penalty", params.repetition_penalty, 1e-6, math.inf),
        ("top_logprobs", params.top_logprobs, 0, MAX_TOP_LOGPROBS),
    )
    for name, value, low, high in ranges:
        if not (math.isfinite(value) and low <= value <= high):
            raise RequestError(f"{name} is out of range", param=name, expected=f"{low} to {high}", found=value)
    for token_id, bias in params.logit_bias:
        if not (0 <= token_id < vocab_size and math.isfinite(bias)):
            raise RequestError(
                "a logit_bias entry is out of range",
                param="logit_bias",
                expected=f"a finite bias for a token id from 0 to {vocab_size - 1}",
                found=f"{token_id}: {bias}",
            )


class KvLedger:
    """KV memory of the smallest stage, in tokens: who holds how many, in whole allocation steps."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._held: dict[int, int] = {}
        self._snapshots: dict[int, int] = {}
        self.reserved_tokens = 0

    @property
    def free_tokens(self) -> int:
        """Cached tokens that nobody holds."""
        return self.limits.kv_capacity_tokens - self.reserved_tokens

    def held(self, seq_id: int) -> int:
        """Cached tokens reserved for a sequence, without its snapshots."""
        return self._held.get(seq_id, 0)

    def held_in_snapshots(self, seq_id: int) -> int:
        """Cached tokens that a sequence's snapshots take."""
        return self._snapshots.get(seq_id, 0) * self.limits.snapshot_tokens

    def missing(self, seq_id: int, tokens: int) -> int:
        """How many more tokens must be reserved before the sequence can hold `tokens`."""
        return max(0, self.limits.rounded(tokens) - self.held(seq_id))

    def reserve(self, seq_id: int, tokens: int) -> bool:
        """Let the sequence grow to `tokens`; False, and nothing changed, when that does not fit now."""
        missing = self.missing(seq_id, tokens)
        if missing > self.free_tokens:
            return False
        self._held[seq_id] = self.held(seq_id) + missing
        self.reserved_tokens += missing
        return True

    def reserve_snapshot(self, seq_id: int) -> bool:
        """Let the sequence hold one snapshot more; False, and nothing changed, when that does not fit now."""
        if self.limits.snapshot_tokens > self.free_tokens:
            return False
        self._snapshots[seq_id] = self._snapshots.get(seq_id, 0) + 1
        self.reserved_tokens += self.limits.snapshot_tokens
        return True

    def release_snapshot(self, seq_id: int) -> None:
        """Give back what one of its snapshots takes."""
        self._snapshots[seq_id] -= 1
        self.reserved_tokens -= self.limits.snapshot_tokens

    def take(self, seq_id: int, cached_tokens: int) -> None:
        """Count what the stages hold already, whether it fits or not: cached tokens, in whole steps."""
        self._held[seq_id] = self.held(seq_id) + cached_tokens
        self.reserved_tokens += cached_tokens

    def transfer(self, seq_id: int, to: int) -> None:
        """Let a new name hold all that another held."""
        for held in (self._held, self._snapshots):
            held[to] = held.get(to, 0) + held.pop(seq_id, 0)

    def release(self, seq_id: int) -> None:
        """Give back all that a sequence holds."""
        self.reserved_tokens -= self.held_in_snapshots(seq_id) + self._held.pop(seq_id, 0)
        self._snapshots.pop(seq_id, None)
