"""Log-probabilities in the two forms that OpenAI's endpoints use; it knows nothing of how tokens were sampled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from exo_kimi.chat.tokenizer import KimiTokenizer
from exo_kimi.runtime.requests import TokenEvent

LOWEST = -9999.0  # OpenAI's word for a token that is practically impossible; JSON has no infinity


def chat_logprobs(tokens: Sequence[TokenEvent], tokenizer: KimiTokenizer, top: int) -> dict[str, Any]:
    """`choices[].logprobs` of a chat answer.

    Args:
        tokens: those of the text, not of reasoning or tool calls.
        tokenizer: gives a token's text and bytes.
        top: how many alternatives to show for each.
    """
    content = [
        {
            **_entry(event.token_id, event.logprob, tokenizer),
            "top_logprobs": [_entry(token_id, logprob, tokenizer) for token_id, logprob in event.top_logprobs[:top]],
        }
        for event in tokens
    ]
    return {"content": content, "refusal": None}


def text_logprobs(tokens: Sequence[TokenEvent], tokenizer: KimiTokenizer, top: int, offset: int) -> dict[str, Any]:
    """`choices[].logprobs` of a text completion.

    Args:
        tokens: the tokens of some text.
        tokenizer: gives a token's text.
        top: how many alternatives to show for each.
        offset: characters of the answer before this text.
    """
    texts = [token_text(event.token_id, tokenizer) for event in tokens]
    offsets = [offset + sum(map(len, texts[:position])) for position in range(len(texts))]
    tops = [
        {token_text(token_id, tokenizer): _finite(logprob) for token_id, logprob in event.top_logprobs[:top]}
        for event in tokens
    ]
    return {
        "tokens": texts,
        "token_logprobs": [_finite(event.logprob) for event in tokens],
        "top_logprobs": tops if top else None,
        "text_offset": offsets,
    }


def token_text(token_id: int, tokenizer: KimiTokenizer) -> str:
    """A token alone as text; bytes that are no whole character show as the replacement character."""
    return tokenizer.token_bytes(token_id).decode("utf-8", errors="replace")


def _entry(token_id: int, logprob: float | None, tokenizer: KimiTokenizer) -> dict[str, Any]:
    data = tokenizer.token_bytes(token_id)
    return {"token": data.decode("utf-8", errors="replace"), "logprob": _finite(logprob), "bytes": list(data)}


def _finite(logprob: float | None) -> float:
    return logprob if logprob is not None and math.isfinite(logprob) else LOWEST
