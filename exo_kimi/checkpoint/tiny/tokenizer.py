"""A small tokenizer in Kimi's file format, trained on a text of our own.

Source: the format of `tiktoken.model` is tiktoken's `load_tiktoken_bpe`; names of the special tokens as in Kimi-K2's
`tokenizer_config.json`.
"""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

from exo_kimi.errors import UsageError

SPECIAL_TOKENS = 256
SMALLEST_VOCABULARY = 256 + SPECIAL_TOKENS
BOS, EOS, IM_END, MEDIA_PAD, PAD = 0, 1, 2, 21, 255
# Place after the ordinary tokens -> name. Real Kimi: 163584 + place.
_NAMED = {
    BOS: "[BOS]",
    EOS: "[EOS]",
    IM_END: "<|im_end|>",
    3: "<|im_user|>",
    4: "<|im_assistant|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "[EOT]",
    10: "<|im_system|>",
    11: "<|tool_calls_section_begin|>",
    12: "<|tool_calls_section_end|>",
    13: "<|tool_call_begin|>",
    14: "<|tool_call_argument_begin|>",
    15: "<|tool_call_end|>",
    17: "<|im_middle|>",
    18: "<|media_begin|>",
    19: "<|media_content|>",
    20: "<|media_end|>",
    MEDIA_PAD: "<|media_pad|>",
    22: "<think>",
    23: "</think>",
    254: "[UNK]",
    PAD: "[PAD]",
}
# Kimi marks these as ordinary added tokens, so that decoders which drop "special" ones still show them.
_NOT_SPECIAL = frozenset(range(11, 16)) | {22, 23}
_WORDS = re.compile(r"[\u4e00-\u9fff]{1,2}| ?[^\W\d_\u4e00-\u9fff]+|\d{1,3}| ?[^\w\s]+|_+|\s+")


def write_tokenizer(
    directory: Path, vocab_size: int, *, chat_template: str | None = None, ordinary: Sequence[bytes] | None = None
) -> None:
    """Write `tiktoken.model`, `tokenizer_config.json` and `generation_config.json`.

    Args:
        directory: an existing directory.
        vocab_size: all ids; the last 256 are the special tokens. At least 512.
        chat_template: written to `chat_template.jinja` when given.
        ordinary: the tokens that are not special, in rank order, in place of those of the built-in text.
    """
    ordinary = ordinary_tokens(vocab_size) if ordinary is None else ordinary
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ordinary))
    (directory / "tiktoken.model").write_text("".join(lines), encoding="ascii")
    first = len(ordinary)
    _write_json(directory / "tokenizer_config.json", _tokenizer_config(first))
    _write_json(
        directory / "generation_config.json",
        {"bos_token_id": first + BOS, "eos_token_id": first + IM_END, "max_length": 131072},
    )
    if chat_template is not None:
        (directory / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


@lru_cache(maxsize=4)
def ordinary_tokens(vocab_size: int) -> tuple[bytes, ...]:
    """The bytes of every token that is not special, in rank order.

    Raises:
        UsageError: vocab_size has no room for 256 bytes and 256 special tokens.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        room = f"at least {SMALLEST_VOCABULARY}: 256 bytes and 256 special tokens"
        raise UsageError("vocab_size is too small", expected=room, found=vocab_size)
    return learn_tokens(Counter(_WORDS.findall(_corpus())), vocab_size - SPECIAL_TOKENS)


def learn_tokens(words: Counter[str], wanted: int) -> tuple[bytes, ...]:
    """The bytes of `wanted` tokens in rank order: every single byte, then merges within the words, most frequent first."""
    # Printable bytes first, as in Kimi's file: rank and byte value are not the same number.
    printable = [*range(ord("!"), 127), *range(0xA1, 0xAD), *range(0xAE, 256)]
    single = [bytes([value]) for value in (*printable, *(value for value in range(256) if value not in printable))]
    tokens = [*single, *_merges(words, wanted - len(single))]
    # A text this short gives no more merges: the rest are fillers that no text contains.
    tokens += [f"\x00filler {number}".encode() for number in range(wanted - len(tokens))]
    return tuple(tokens)


def _merges(words: Counter[str], count: int) -> list[bytes]:
    """Byte pair encoding: the `count` most frequent pairs, each merged before the next is counted."""
    spelled = [([bytes([value]) for value in word.encode()], times) for word, times in words.items()]
    pairs: Counter[tuple[bytes, bytes]] = Counter()
    holders: dict[tuple[bytes, bytes], set[int]] = {}

    def count_word(index: int, sign: int) -> None:
        parts, times = spelled[index]
        for pair in pairwise(parts):
            pairs[pair] += sign * times
            holders.setdefault(pair, set()).add(index)

    for index in range(len(spelled)):
        count_word(index, 1)
    merges: dict[bytes, None] = {}  # a set in order: two routes to the same bytes are one token
    while len(merges) < count:
        left, right = best = max(pairs, key=pairs.__getitem__)
        if pairs[best] <= 0:
            break
        merges[left + right] = None
        for index in sorted(holders.pop(best)):
            count_word(index, -1)
            parts, position = spelled[index][0], 0
            while position < len(parts) - 1:
                if parts[position] == left and parts[position + 1] == right:
                    parts[position : position + 2] = [left + right]
                position += 1
            count_word(index, 1)
        del pairs[best]
    return list(merges)


def _corpus() -> str:
    return resources.files("exo_kimi.checkpoint").joinpath("data", "tiny_corpus.txt").read_text(encoding="utf-8")


def _tokenizer_config(first: int) -> dict[str, Any]:
    names = {place: _NAMED.get(place, f"<|reserved_token_{first + place}|>") for place in range(SPECIAL_TOKENS)}
    return {
        "added_tokens_decoder": {
            str(first + place): {
                "content": name,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": place not in _NOT_SPECIAL,
            }
            for place, name in names.items()
        },
        "additional_special_tokens": [names[place] for place in (2, 3, 4, 6, 7, 9, 10, 17, 21)],
        "bos_token": names[BOS],
        "clean_up_tokenization_spaces": False,
        "eos_token": names[EOS],
        "extra_special_tokens": {},
        "model_max_length": int(1e30),
        "pad_token": names[PAD],
        "tokenizer_class": "TikTokenTokenizer",
        "unk_token": names[254],
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
