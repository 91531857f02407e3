"""The events of a reply as exo's chunks.

Tool calls come last, in one chunk: exo's API ends a reply at the first chunk that has a finish reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from exo_kimi.chat.tokenizer import KimiTokenizer
from exo_kimi.dialogue.events import ContentEvent, EndEvent, ReasoningEvent, ReplyEvent, ToolCallEvent
from exo_kimi.dialogue.prepare import PreparedRequest
from exo_kimi.runtime.requests import TokenEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class ExoTypes:
    """exo's own types, by their names there."""

    TokenChunk: Any
    ToolCallChunk: Any
    ErrorChunk: Any
    PrefillProgressChunk: Any
    ModelLoadingResponse: Any
    FinishedResponse: Any
    CancelledResponse: Any
    Usage: Any
    PromptTokensDetails: Any
    CompletionTokensDetails: Any
    GenerationStats: Any
    ToolCallItem: Any
    TopLogprobItem: Any
    Memory: Any
    cancel_all: str

    @classmethod
    def installed(cls) -> ExoTypes:
        """Those of the exo around us."""
        api = importlib.import_module("exo.api.types")
        chunks = importlib.import_module("exo.shared.types.chunks")
        responses = importlib.import_module("exo.shared.types.worker.runner_response")
        finished, cancelled = _endings(responses)
        return cls(
            TokenChunk=chunks.TokenChunk,
            ToolCallChunk=chunks.ToolCallChunk,
            ErrorChunk=chunks.ErrorChunk,
            PrefillProgressChunk=chunks.PrefillProgressChunk,
            ModelLoadingResponse=responses.ModelLoadingResponse,
            FinishedResponse=finished,
            CancelledResponse=cancelled,
            Usage=api.Usage,
            PromptTokensDetails=api.PromptTokensDetails,
            CompletionTokensDetails=api.CompletionTokensDetails,
            GenerationStats=api.GenerationStats,
            ToolCallItem=api.ToolCallItem,
            TopLogprobItem=api.TopLogprobItem,
            Memory=importlib.import_module("exo.shared.types.memory").Memory,
            cancel_all=str(importlib.import_module("exo.shared.types.tasks").CANCEL_ALL_TASKS),
        )


def _endings(responses: Any) -> tuple[Any, Any]:
    """How an engine says that a task has ended, and that it was cancelled."""
    if hasattr(responses, "CancelledResponse"):
        return responses.FinishedResponse, responses.CancelledResponse
    runner = importlib.import_module("exo.worker.runner.llm_inference.runner")  # v1.0.71's
    return runner.Finished, runner.Cancelled


class ChunkWriter:
    """Writes the events of one reply as exo's chunks.

    Args:
        types: exo's.
        model_id: written into every chunk.
        prepared: the reply's request, of one choice.
        tokenizer: of the model.
        peak_bytes: most memory that this rank has used, asked at the end.
    """

    def __init__(
        self,
        types: ExoTypes,
        model_id: str,
        prepared: PreparedRequest,
        tokenizer: KimiTokenizer,
        *,
        peak_bytes: Callable[[], int],
    ) -> None:
        self._types = types
        self._model_id = model_id
        self._prepared = prepared
        self._tokenizer = tokenizer
        self._peak_bytes = peak_bytes
        self._calls: list[ToolCallEvent] = []
        self._last_id = 0

    def write(self, token: TokenEvent | None, events: Sequence[ReplyEvent]) -> list[Any]:
        """The chunks of a token's events; without a token, those of what was held back and of the end."""
        if token is not None:
            self._last_id = token.token_id
        chunks = []
        for event in events:
            match event:
                case ContentEvent(text=text):
                    chunks.append(self._text(text, token, thinking=False))
                case ReasoningEvent(text=text):
                    chunks.append(self._text(text, token, thinking=True))
                case ToolCallEvent():
                    self._calls.append(event)
                case EndEvent():
                    chunks.append(self._end(event))
        return chunks

    def _text(self, text: str, token: TokenEvent | None, *, thinking: bool) -> Any:
        top = [
            self._types.TopLogprobItem(token=shown.decode("utf-8", "replace"), logprob=logprob, bytes=list(shown))
            for token_id, logprob in (token.top_logprobs if token is not None else ())
            for shown in (self._tokenizer.token_bytes(token_id),)
        ]
        return self._types.TokenChunk(
            model=self._model_id,
            text=text,
            token_id=self._last_id,
            usage=None,
            logprob=token.logprob if token is not None else None,
            top_logprobs=top or None,
            is_thinking=thinking,
        )

    def _end(self, end: EndEvent) -> Any:
        types = self._types
        ending = {"model": self._model_id, "usage": self._usage(end), "stats": self._stats(end)}
        if self._calls:
            calls = [types.ToolCallItem(id=call.id, name=call.name, arguments=call.arguments) for call in self._calls]
            return types.ToolCallChunk(tool_calls=calls, **ending)
        return types.TokenChunk(text="", token_id=self._last_id, finish_reason=end.finish_reason, **ending)

    def _usage(self, end: EndEvent) -> Any:
        types, usage = self._types, self._prepared.usage([end])
        return types.Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            total_tokens=usage.total_tokens,
            prompt_tokens_details=types.PromptTokensDetails(cached_tokens=usage.cached_tokens),
            completion_tokens_details=types.CompletionTokensDetails(
                reasoning_tokens=usage.reasoning_tokens,
                accepted_prediction_tokens=usage.accepted_drafts,
                rejected_prediction_tokens=usage.rejected_drafts,
            ),
        )

    def _stats(self, end: EndEvent) -> Any:
        prompt_tokens, generated = self._prepared.prompt_tokens, end.completion_tokens
        computed = prompt_tokens - end.cached_tokens
        # Of a prompt that was known to its last token, that one is computed again: a token is made from what it gives.
        hit = "none" if not end.cached_tokens else "exact" if computed <= 1 else "partial"
        return self._types.GenerationStats(
            prompt_tps=computed / max(end.ttft_s, 1e-6),
            generation_tps=(generated - 1) / max(end.decode_s, 1e-6) if generated > 1 else 0.0,
            prompt_tokens=prompt_tokens,
            generation_tokens=generated,
            peak_memory_usage=self._types.Memory.from_bytes(self._peak_bytes()),
            prefix_cache_hit=hit,
        )
