"""Texts from files of the user's: prose, or a conversation, a text or token ids on each line of a .jsonl file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exo_kimi.checkpoint.text_files import read_text
from exo_kimi.compress.texts.encoding import Encoded, Encoder
from exo_kimi.errors import UsageError

WINDOW_TOKENS = 2048
"""A file of prose is cut into texts of so many tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenConversation:
    """A conversation of a file."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


def read_texts(files: Sequence[Path], encoder: Encoder, *, most_tokens: int | None = None) -> list[Encoded]:
    """Read files as texts. The domain of each is the file's stem, or what its line says.

    Args:
        files: `.jsonl` with {"messages": [...], "tools": [...]}, {"prompt": "...", "completion": "..."}, {"text": "..."} or
            {"ids": [...]} on each line, each with "domain" if wanted; any other file is prose.
        encoder: of the model.
        most_tokens: stop there, in the middle of the files' texts if need be; None takes all.

    Raises:
        UsageError: a file cannot be read, or a line is none of these.
    """
    texts: list[Encoded] = []
    for file in files:
        try:
            content = read_text(file)
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError("a text cannot be read", found=error, where=file) from None
        texts += _lines(file, content, encoder) if file.suffix == ".jsonl" else _prose(file.stem, content, encoder)
    texts = [text for text in texts if len(text.ids) > 1 and text.counted[1:].any()]
    return texts if most_tokens is None else list(_first(texts, most_tokens))


def _prose(domain: str, content: str, encoder: Encoder) -> list[Encoded]:
    ids = np.array(encoder.tokenizer.encode(content), np.int32)
    return [_plain(ids[start : start + WINDOW_TOKENS], domain) for start in range(0, len(ids), WINDOW_TOKENS)]


def _lines(file: Path, content: str, encoder: Encoder) -> Iterator[Encoded]:
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            raw = json.loads(line)
            if not isinstance(raw, Mapping):
                raise TypeError(f"a {type(raw).__name__}")
            yield _entry(raw, file.stem, encoder)
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                "not a text",
                expected='{"messages": [...], the last an assistant\'s}, {"text": "..."} or {"ids": [...]}',
                found=f"{type(error).__name__}: {error}",
                where=where,
            ) from None


def _entry(raw: Mapping[str, Any], stem: str, encoder: Encoder) -> Encoded:
    domain = str(raw.get("domain", stem))
    if "ids" in raw:
        ids = np.array(raw["ids"], np.int32)
        if ids.ndim != 1 or (ids < 0).any() or (ids >= encoder.tokenizer.vocab_size).any():
            raise ValueError(f"ids outside the vocabulary of {encoder.tokenizer.vocab_size}")
        return _plain(ids, domain)
    if "text" in raw:
        return _plain(np.array(encoder.tokenizer.encode(str(raw["text"])), np.int32), domain)
    if "prompt" in raw and "completion" in raw:
        asked, answer = str(raw["prompt"]), str(raw["completion"])
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    else:
        messages = raw["messages"]
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError("the last message is not an assistant's")
    return encoder.encode(GivenConversation(messages=messages, tools=raw.get("tools")), domain=domain)


def _plain(ids: np.ndarray[tuple[int], np.dtype[np.int32]], domain: str) -> Encoded:
    counted = np.ones(len(ids), bool)
    counted[:1] = False
    return Encoded(ids=ids, counted=counted, domain=domain)


def _first(texts: Sequence[Encoded], most_tokens: int) -> Iterator[Encoded]:
    left = most_tokens
    for text in texts:
        if left < 2:
            return
        cut = min(left, len(text.ids))
        left -= cut
        if text.counted[1:cut].any():
            yield Encoded(ids=text.ids[:cut], counted=text.counted[:cut], domain=text.domain)
