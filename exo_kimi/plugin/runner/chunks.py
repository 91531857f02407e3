"""From generated tokens to exo's chunks; it knows the fields of exo's types and nothing else of exo.

Tool calls come last, in one chunk: exo's API ends a reply at the first chunk that has a finish reason.
"""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass
from typing import Any

from exo_kimi.chat.events import ContentDelta, OutputEvent, ReasoningDelta, ToolCallEvent
from exo_kimi.chat.output import OutputParser
from exo_kimi.chat.tokenizer import KimiTokenizer
from exo_kimi.runtime.requests import FinishReason, TokenEvent


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
    """Chunks of one reply.

    Args:
        types: exo's.
        model_id: written into every chunk.
        parser: fresh, of this reply.
        tokenizer: of the model.
        prompt_tokens: length of the prompt.
    """

    def __init__(
        self, types: ExoTypes, model_id: str, parser: OutputParser, tokenizer: KimiTokenizer, *, prompt_tokens: int
    ) -> None:
        self._types = types
        self._model_id = model_id
        self._parser = parser
        self._tokenizer = tokenizer
        self._prompt_tokens = prompt_tokens
        self._calls: list[ToolCallEvent] = []
        self._generated = self._reasoning = self._cached = 0
        self._last_id = 0
        self._reason: FinishReason = "stop"
        self._begun_s = time.monotonic()
        self._first_s: float | None = None

    @property
    def satisfied(self) -> bool:
        """A stop string was met: the generation can be ended."""
        return self._parser.stopped

    def feed(self, event: TokenEvent) -> list[Any]:
        """The chunks that this token completes."""
        if self._first_s is None:
            self._first_s = time.monotonic()
        self._generated += 1
        self._last_id = event.token_id
        self._cached = max(self._cached, event.cached_tokens)
        if self._parser.reasoning_open:
            self._reasoning += 1
        if event.finish_reason is not None:
            self._reason = event.finish_reason
            if event.finish_reason == "stop" and event.token_id in self._tokenizer.stop_ids:
                return []
        return self._chunks(self._parser.feed(event.token_id), event)

    def finish(self, *, peak_bytes: int = 0) -> list[Any]:
        """What was held back, then the chunk that ends the reply.

        Args:
            peak_bytes: most memory that this rank has used.
        """
        chunks = self._chunks(self._parser.finish(), None)
        types = self._types
        ending = {"model": self._model_id, "usage": self._usage(), "stats": self._stats(peak_bytes)}
        if self._calls:
            calls = [types.ToolCallItem(id=call.id, name=call.name, arguments=call.arguments) for call in self._calls]
            return [*chunks, types.ToolCallChunk(tool_calls=calls, **ending)]
        reason = "stop" if self._parser.stopped else self._reason
        return [*chunks, types.TokenChunk(text="", token_id=self._last_id, finish_reason=reason, **ending)]

    def _chunks(self, events: list[OutputEvent], token: TokenEvent | None) -> list[Any]:
        chunks = []
        for event in events:
            match event:
                case ContentDelta(text=text):
                    chunks.append(self._text(text, token, thinking=False))
                case ReasoningDelta(text=text):
                    chunks.append(self._text(text, token, thinking=True))
                case ToolCallEvent():
                    self._calls.append(event)
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

    def _usage(self) -> Any:
        types = self._types
        return types.Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._generated,
            total_tokens=self._prompt_tokens + self._generated,
            prompt_tokens_details=types.PromptTokensDetails(cached_tokens=self._cached),
            completion_tokens_details=types.CompletionTokensDetails(reasoning_tokens=self._reasoning),
        )

    def _stats(self, peak_bytes: int) -> Any:
        now_s = time.monotonic()
        first_s = self._first_s or now_s
        return self._types.GenerationStats(
            prompt_tps=self._prompt_tokens / max(first_s - self._begun_s, 1e-6),
            generation_tps=(self._generated - 1) / max(now_s - first_s, 1e-6) if self._generated > 1 else 0.0,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generated,
            peak_memory_usage=self._types.Memory.from_bytes(peak_bytes),
        )
