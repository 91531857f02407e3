"""Check tiktoken.model and tokenizer_config.json: ranks, control tokens and whether they fit the embedding.

The checks find all that `chat.tokenizer_files` refuses one at a time, and more: tokens that a template needs, and ids without
an embedding row. A test holds the two together.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exo_kimi.checkpoint.doctor.findings import Checkup
from exo_kimi.checkpoint.text_files import read_bytes, read_json
from exo_kimi.errors import TokenizerError

MODEL_FILE = "tiktoken.model"
TOKENIZER_CONFIG = "tokenizer_config.json"
# Source: tokenization_kimi.py, num_reserved_special_tokens.
RESERVED = 256
# Without these no turn of a conversation can be written ...
_TURNS = ("<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>")
# ... and without these, tools, stopping or padding suffer.
_OTHERS = (
    "[BOS]",
    "[EOS]",
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
)
_FIX = "copy it from the model's original repository"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerReading:
    """What could be read, else None: tokenizer_config.json, ids of named control tokens, number of ordinary tokens."""

    config: Mapping[str, Any] | None
    special: Mapping[str, int] | None
    ranks: int | None


def check_tokenizer(root: Path, vocab_size: int | None, checkup: Checkup) -> TokenizerReading:
    """Note every finding about the tokenizer.

    Args:
        root: the checkpoint.
        vocab_size: rows of the embedding; None where config.json does not tell.
        checkup: gets the findings.
    """
    ranks = _check_ranks(root / MODEL_FILE, checkup)
    config = read_object(root, TOKENIZER_CONFIG, checkup)
    names = None if config is None else _check_entries(config, checkup)
    special = None
    if names is not None and ranks is not None:
        special = _check_ids(names, ranks, vocab_size, checkup)
        _check_names(special, checkup)
    return TokenizerReading(config=config, special=special, ranks=ranks)


def read_object(root: Path, name: str, checkup: Checkup, *, fixable: bool = False) -> dict[str, Any] | None:
    """Read the JSON object in a file that must exist; None, and a finding, where that fails."""
    try:
        value = read_json(root / name)
    except FileNotFoundError:
        checkup.error(TokenizerError(f"{name} is missing", where=name, fix=_FIX), fixable=fixable)
    except OSError as error:
        checkup.error(TokenizerError(f"{name} cannot be read", found=error.strerror, where=name))
    except ValueError as error:
        checkup.error(TokenizerError(f"{name} is not JSON", found=error, where=name, fix=_FIX), fixable=fixable)
    else:
        if isinstance(value, dict):
            return value
        found = type(value).__name__
        checkup.error(
            TokenizerError(f"{name} is malformed", expected="a JSON object", found=found, where=name, fix=_FIX),
            fixable=fixable,
        )
    return None


def _check_ranks(path: Path, checkup: Checkup) -> int | None:
    """The number of ordinary tokens."""
    try:
        lines = read_bytes(path).splitlines()
    except FileNotFoundError:
        checkup.error(TokenizerError(f"{path.name} is missing", where=path.name, fix=_FIX))
        return None
    except OSError as error:
        checkup.error(TokenizerError(f"{path.name} cannot be read", found=error.strerror, where=path.name))
        return None
    bad, again = [], []
    tokens: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            encoded, rank_text = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(rank_text)
        except ValueError:
            bad.append(number)
            continue
        if not token:
            bad.append(number)
        elif token in tokens:
            again.append(number)
        else:
            tokens[token] = rank
    count = len(tokens)
    holes = not (bad or again) and sorted(tokens.values()) != list(range(count))
    bytes_missing = 0 if bad else sum(bytes((byte,)) not in tokens for byte in range(256))
    for wrong, what, expected, found in (
        (bad, "has malformed lines", "a token in base64, a space, its rank", _lines(bad)),
        (again, "has the same token twice", "every token once", _lines(again)),
        (holes, "has ranks that leave holes or repeat", f"0 .. {count - 1}, each once", _odd_ranks(tokens)),
        (bytes_missing, "lacks tokens for single bytes", "256 single bytes", f"{256 - bytes_missing}"),
    ):
        if wrong:
            checkup.error(
                TokenizerError(f"{path.name} {what}", expected=expected, found=found, where=path.name, fix=_FIX)
            )
    return None if bad or again or holes or bytes_missing else count


def _lines(numbers: list[int]) -> str:
    return f"{len(numbers):,} of them, line {numbers[0]:,} first" if numbers else ""


def _odd_ranks(tokens: Mapping[bytes, int]) -> str:
    ranks = sorted(tokens.values())
    return next((f"rank {rank} where {place} belongs" for place, rank in enumerate(ranks) if rank != place), "")


def _check_entries(config: Mapping[str, Any], checkup: Checkup) -> dict[int, str] | None:
    """Names of control tokens by id, from `added_tokens_decoder`."""
    entries = config.get("added_tokens_decoder")
    where = f"{TOKENIZER_CONFIG}, added_tokens_decoder"
    if not isinstance(entries, dict):
        checkup.error(
            TokenizerError(
                f"{TOKENIZER_CONFIG} names no control tokens",
                expected="added_tokens_decoder: {id: {content: name}}",
                found=ascii(entries)[:80],
                where=where,
                fix=_FIX,
            )
        )
        return None
    names: dict[int, str] = {}
    odd = []
    for key, entry in entries.items():
        name = entry.get("content") if isinstance(entry, dict) else entry
        if key.isdecimal() and len(key) < 20 and isinstance(name, str) and name:
            names[int(key)] = name
        else:
            odd.append(f"{key}: {entry}")
    if odd:
        checkup.error(
            TokenizerError(
                f"{TOKENIZER_CONFIG} has malformed entries",
                expected="a token id with its content",
                found=f"{len(odd)} of {len(entries)}: {ascii(odd[0])[:80]}",
                where=where,
                fix=_FIX,
            )
        )
    return names


def _check_ids(names: Mapping[int, str], ranks: int, vocab_size: int | None, checkup: Checkup) -> dict[str, int]:
    """Whether the ids begin after the ordinary tokens, stay within the embedding and name each token once."""
    where = f"{TOKENIZER_CONFIG}, added_tokens_decoder"
    both = f"{MODEL_FILE} and {TOKENIZER_CONFIG} must come from the same checkpoint"
    low = sorted(token for token in names if token < ranks)
    if low:
        checkup.error(
            TokenizerError(
                "control tokens have the ids of ordinary tokens",
                expected=f"{ranks} or above ({MODEL_FILE} has {ranks} ranks)",
                found=f"{len(low)} below, {names[low[0]]} with {low[0]} first",
                where=where,
                fix=both,
            )
        )
    elif names and min(names) != ranks:
        checkup.error(
            TokenizerError(
                "ordinary and control tokens leave a hole between them",
                expected=f"the first control token at {ranks} ({MODEL_FILE} has {ranks} ranks)",
                found=f"{names[min(names)]} at {min(names)}",
                where=where,
                fix=f"{MODEL_FILE} is cut short or from another checkpoint: {_FIX}",
            )
        )
    end = ranks + RESERVED
    if vocab_size is not None and end != vocab_size:
        what = "ids beyond the embedding" if end > vocab_size else "fewer ids than the embedding has rows"
        checkup.error(
            TokenizerError(
                f"the tokenizer has {what}",
                expected=f"{vocab_size} ids (vocab_size of config.json)",
                found=f"{end}: {ranks} ordinary and {RESERVED} control tokens",
                where=MODEL_FILE,
                fix="the tokenizer's files and config.json must come from the same checkpoint",
            )
        )
    special: dict[str, int] = {}
    for token, name in sorted(names.items()):
        if not ranks <= token < end:
            continue  # K2.5's video placeholder lies past the reserved ids: it is no control token
        if name in special:
            checkup.error(
                TokenizerError(
                    f"control token {name} has two ids", found=f"{special[name]} and {token}", where=where, fix=_FIX
                )
            )
        special.setdefault(name, token)
    return special


def _check_names(special: Mapping[str, int], checkup: Checkup) -> None:
    for needed, harm in (
        (_TURNS, "a prompt would spell them as ordinary text"),
        (_OTHERS, "tool calls or stopping would fail"),
        (("<think>",) if "</think>" in special else (), "reasoning would not be told from the answer"),
        (("</think>",) if "<think>" in special else (), "reasoning would not be told from the answer"),
    ):
        missing = [name for name in needed if name not in special]
        if missing:
            checkup.error(
                TokenizerError(
                    f"{TOKENIZER_CONFIG} lacks control tokens: {harm}",
                    expected=", ".join(needed),
                    found=f"without {', '.join(missing)}",
                    where=f"{TOKENIZER_CONFIG}, added_tokens_decoder",
                    fix=_FIX,
                )
            )
