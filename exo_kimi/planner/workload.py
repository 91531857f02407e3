"""The work that a cluster is planned for, and the memory that it takes beside the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.scratch import scratch_needed
from exo_kimi.errors import UsageError
from exo_kimi.units import GIB

Objective = Literal["request", "latency", "throughput", "ttft"]
OBJECTIVES: tuple[Objective, ...] = ("request", "latency", "throughput", "ttft")

DEFAULT_CONTEXT = 40_960
DEFAULT_PROMPT = 4_096
DEFAULT_NEW = 512
# A sequence's cache grows in whole steps of this many tokens. Source: mlx-lm `KVCache.step`.
CACHE_STEP = 256
# One block of attention scores never exceeds this. Source: `SCRATCH_BYTES` of exo_kimi.models.ops.
SCORE_BYTES = 512 << 20
# What expanded keys and values take at most where less will do: a stage expands as many heads at a time as its budget holds.
EXPANDED_BYTES = 4 * GIB
FEW_QUERIES = 128  # few enough to attend in latent space, where nothing is expanded
# What a stage needs beside what is counted: Python, Metal's heaps, MLX's buffer cache, message buffers.
RESERVE_BYTES = 8 * GIB
# `exo-kimi serve` runs on the machine of stage 0: the API, the tokenizer and the requests that wait.
SERVER_BYTES = 2 * GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Tokens of context and of the request that is timed.

    Args:
        context: tokens that one sequence may reach; KV memory is kept for all of them.
        concurrency: sequences that may be that long at the same time.
        prompt_tokens: of the request that `request` and `ttft` time.
        new_tokens: that this request generates.
        prefill_chunk: prompt tokens of one step, as the engine cuts them.
        reserve_bytes: per stage, see RESERVE_BYTES.
        server_bytes: on the machine of stage 0, see SERVER_BYTES.
        ends_everywhere: every stage holds embedding and head, as exo's own engine does.
    """

    context: int = DEFAULT_CONTEXT
    concurrency: int = 1
    prompt_tokens: int = DEFAULT_PROMPT
    new_tokens: int = DEFAULT_NEW
    prefill_chunk: int = 512
    reserve_bytes: int = RESERVE_BYTES
    server_bytes: int = SERVER_BYTES
    ends_everywhere: bool = False

    @property
    def chunks(self) -> int:
        """Prefill steps of one prompt."""
        return -(-self.prompt_tokens // self.prefill_chunk)

    @property
    def chunk_tokens(self) -> float:
        """Tokens of a prefill step, on average."""
        return self.prompt_tokens / self.chunks

    @property
    def mean_prompt_keys(self) -> float:
        """Cached tokens that a prompt's token is multiplied with: all before its chunk, and the whole of it, on average."""
        return (self.prompt_tokens + self.chunk_tokens) / 2

    @property
    def kv_tokens(self) -> int:
        """Cached tokens that every stage keeps memory for."""
        return self.concurrency * (-(-self.context // CACHE_STEP) * CACHE_STEP)

    @property
    def mean_cached_tokens(self) -> int:
        """Cached tokens that a decode step of the timed request reads, on average."""
        return self.prompt_tokens + self.new_tokens // 2

    def scratch_bytes(self, config: KimiConfig) -> int:
        """Peak of a prefill step beside weights and caches.

        One block of scores, and twice (the graph of one layer is built while another runs) the keys and values of the
        whole context expanded from the latent, queries and outputs of a chunk, and the experts' activations. bf16. Of a long
        context no more than `EXPANDED_BYTES`, or twice what a step cannot do without.
        """
        heads, chunk = config.num_attention_heads, self.prefill_chunk
        expanded = self.context * heads * (config.qk_head_dim + config.v_head_dim) * 2
        queries = chunk * heads * (config.qk_head_dim + config.v_head_dim) * 2
        routed = chunk * config.num_experts_per_tok * (3 * config.moe_intermediate_size + config.hidden_size) * 2
        hidden = 4 * chunk * config.hidden_size * 2
        whole = SCORE_BYTES + 2 * (expanded + queries + routed + hidden)
        least = 2 * scratch_needed(config, min(chunk, FEW_QUERIES), self.context)
        return min(whole, max(EXPANDED_BYTES, least))


def make_workload(
    config: KimiConfig,
    *,
    context: int | None = None,
    concurrency: int = 1,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    prefill_chunk: int = 512,
    reserve_bytes: int = RESERVE_BYTES,
    server_bytes: int = SERVER_BYTES,
    ends_everywhere: bool = False,
) -> Workload:
    """A workload that the model can do; what is not given fits into the context.

    Raises:
        UsageError: a context beyond the model's, or a request beyond the context.
    """
    most = config.max_position_embeddings
    context = min(DEFAULT_CONTEXT, most) if context is None else context
    if not 2 <= context <= most:
        raise UsageError(
            "the model has no such context", expected=f"2 to {most} tokens", found=context, where="--context"
        )
    new = min(DEFAULT_NEW, context // 2) if new_tokens is None else new_tokens
    prompt = min(DEFAULT_PROMPT, context - new) if prompt_tokens is None else prompt_tokens
    if prompt < 1 or new < 1 or prompt + new > context:
        raise UsageError(
            "the timed request does not fit the context",
            expected=f"prompt and new tokens of at least 1 each, {context} together at most",
            found=f"{prompt} + {new}",
        )
    if concurrency < 1 or prefill_chunk < 1 or min(reserve_bytes, server_bytes) < 0:
        raise UsageError("concurrency and prefill chunk are at least 1, the reserve at least 0")
    return Workload(
        context=context,
        concurrency=concurrency,
        prompt_tokens=prompt,
        new_tokens=new,
        prefill_chunk=prefill_chunk,
        reserve_bytes=reserve_bytes,
        server_bytes=server_bytes,
        ends_everywhere=ends_everywhere,
    )
