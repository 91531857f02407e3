"""Prompts of a given number of tokens and the time until a server has answered one."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import httpx

from exo_kimi.chat.tokenizer import KimiTokenizer
from exo_kimi.errors import UsageError

TIMEOUT_S = 300.0
WORDS = "the reply of a tool says that every file was read and some other lines were found there again".split()


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedReply:
    """What a server said, and when.

    Args:
        seconds: from asking to the whole answer.
        text: of it.
        prompt_tokens: as the server counted them.
        cached_tokens: those of them that it did not compute again, as it says.
    """

    seconds: float
    text: str
    prompt_tokens: int
    cached_tokens: int


def words_of(tokenizer: KimiTokenizer, tokens: int, *, seed: int) -> str:
    """Words that make `tokens` tokens, or a few less; they begin with a space, so that they join any text before them."""
    draw = random.Random(seed)
    text, count = "", 0
    while True:
        word = " " + draw.choice(WORDS)
        count += len(tokenizer.encode(word))
        if count > tokens:
            return text
        text += word


def ask(url: str, prompt: str, *, max_tokens: int = 1) -> TimedReply:
    """A greedy text completion.

    Raises:
        UsageError: the server did not answer with one.
    """
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0.0}
    started_s = time.perf_counter()
    try:
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=TIMEOUT_S, trust_env=False)
        seconds = time.perf_counter() - started_s
        found = answer.raise_for_status().json()
    except httpx.HTTPError as error:
        raise UsageError("a server did not answer", found=repr(error), where=url) from error
    usage = found["usage"]
    return TimedReply(
        seconds=seconds,
        text=found["choices"][0]["text"],
        prompt_tokens=usage["prompt_tokens"],
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
    )
