"""The tokenizer files of a checkpoint directory, read strictly."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exo_kimi.checkpoint.text_files import read_bytes, read_json
from exo_kimi.errors import TokenizerError

MODEL_FILE = "tiktoken.model"
CONFIG_FILE = "tokenizer_config.json"
GENERATION_FILE = "generation_config.json"
RESERVED_SPECIAL_TOKENS = 256  # tokenization_kimi.py: num_reserved_special_tokens
_FIX_COPY = "copy it from the model's original repository"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    """The contents of the tokenizer files.

    Args:
        ranks: token bytes to id; ids 0 .. n-1, every one once.
        special: control token name to id; ids n .. n+255.
        named_tokens: the roles that tokenizer_config.json gives to tokens, such as `bos_token` to `[BOS]`.
        eos_ids: `eos_token_id` of generation_config.json.
    """

    ranks: Mapping[bytes, int]
    special: Mapping[str, int]
    named_tokens: Mapping[str, str]
    eos_ids: frozenset[int]


def read_tokenizer_files(directory: Path) -> TokenizerFiles:
    """Read and check tiktoken.model, tokenizer_config.json and, when it exists, generation_config.json.

    Raises:
        TokenizerError: a file is missing or malformed.
    """
    ranks = _read_ranks(directory / MODEL_FILE)
    config_path = directory / CONFIG_FILE
    config = read_json_object(config_path, required=True)
    special = _read_special(config, len(ranks), config_path)
    roles = ("bos_token", "eos_token", "pad_token", "unk_token")
    named = {role: name for role in roles if (name := _token_text(config.get(role))) is not None}
    generation_path = directory / GENERATION_FILE
    generation = read_json_object(generation_path, required=False)
    eos_ids = _read_eos(generation.get("eos_token_id"), len(ranks) + len(special), generation_path)
    return TokenizerFiles(ranks=ranks, special=special, named_tokens=named, eos_ids=eos_ids)


def read_model_config(directory: Path) -> Mapping[str, Any]:
    """Read config.json; an empty object when there is none.

    Raises:
        TokenizerError: it is no JSON object.
    """
    return read_json_object(directory / "config.json", required=False)


def read_json_object(path: Path, *, required: bool) -> dict[str, Any]:
    """The JSON object in a file; an empty one when the file is absent and not required.

    Raises:
        TokenizerError: it is missing though required, unreadable, or no JSON object.
    """
    try:
        value = read_json(path)
    except FileNotFoundError:
        if not required:
            return {}
        raise TokenizerError(f"{path.name} is missing", where=path, fix=_FIX_COPY) from None
    except OSError as error:
        raise TokenizerError(f"{path.name} cannot be read", found=error.strerror, where=path) from error
    except ValueError as error:
        raise TokenizerError(f"{path.name} is not JSON", found=error, where=path, fix=_FIX_COPY) from error
    if not isinstance(value, dict):
        raise TokenizerError(
            f"{path.name} is malformed", expected="a JSON object", found=type(value).__name__, where=path
        )
    return value


def _read_ranks(path: Path) -> dict[bytes, int]:
    try:
        lines = read_bytes(path).splitlines()
    except FileNotFoundError:
        raise TokenizerError(f"{path.name} is missing", where=path, fix=_FIX_COPY) from None
    except OSError as error:
        raise TokenizerError(f"{path.name} cannot be read", found=error.strerror, where=path) from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            encoded, rank_text = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(rank_text)
        except (ValueError, binascii.Error):
            raise TokenizerError(
                f"{path.name} has a malformed line",
                expected="a token in base64, a space, its rank",
                found=repr(line[:80]),
                where=f"{path}, line {number}",
                fix=_FIX_COPY,
            ) from None
        if token in ranks or not token:
            raise TokenizerError(
                f"{path.name} has {'the same token twice' if token else 'an empty token'}",
                found=repr(line[:80]),
                where=f"{path}, line {number}",
                fix=_FIX_COPY,
            )
        ranks[token] = rank
    # Special ids begin after the last rank, so a hole would shift every control token.
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise TokenizerError(
            f"{path.name} has ranks that leave holes or repeat",
            expected=f"0 .. {len(ranks) - 1}, each once",
            where=path,
            fix=_FIX_COPY,
        )
    missing = [byte for byte in range(256) if bytes((byte,)) not in ranks]
    if missing:
        raise TokenizerError(
            f"{path.name} lacks tokens for single bytes",
            expected="256 single bytes",
            found=f"{256 - len(missing)}; the first one missing is 0x{missing[0]:02x}",
            where=path,
            fix=_FIX_COPY,
        )
    return ranks


def _read_special(config: Mapping[str, Any], first_id: int, path: Path) -> dict[str, int]:
    entries = config.get("added_tokens_decoder")
    if not isinstance(entries, dict):
        raise TokenizerError(
            f"{path.name} names no control tokens", expected="added_tokens_decoder: {id: {content: name}}", where=path
        )
    names: dict[int, str] = {}
    for key, entry in entries.items():
        name = _token_text(entry)
        if not key.isdecimal() or len(key) > 9 or not name or not name.isprintable():
            raise TokenizerError(
                f"{path.name} has a malformed entry",
                expected="a token id with its content, which can be printed",
                found=f"{key[:20]!r}: {entry!r}"[:120],
                where=f"{path}, added_tokens_decoder",
            )
        if int(key) < first_id:
            raise TokenizerError(
                f"control token {name} has the id of an ordinary token",
                expected=f"{first_id} or above ({MODEL_FILE} has {first_id} ranks)",
                found=key,
                where=f"{path}, added_tokens_decoder",
                fix=f"{MODEL_FILE} and {CONFIG_FILE} must come from the same checkpoint",
            )
        names[int(key)] = name
    # An id past the reserved ones has no row in the embedding (K2.5's video placeholder), so it is no control token.
    special: dict[str, int] = {}
    for token_id in range(first_id, first_id + RESERVED_SPECIAL_TOKENS):
        name = names.get(token_id, f"<|reserved_token_{token_id}|>")
        if name in special:
            raise TokenizerError(
                f"control token {name} has two ids", found=f"{special[name]} and {token_id}", where=path
            )
        special[name] = token_id
    return special


def _token_text(entry: object) -> str | None:
    """The name in `"[BOS]"` or in `{"content": "[BOS]", ...}`."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def _read_eos(value: object, vocab_size: int, path: Path) -> frozenset[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
            raise TokenizerError(
                f"{path.name} has an eos_token_id that is no token",
                expected=f"ids from 0 to {vocab_size - 1}",
                found=repr(token_id),
                where=path,
            )
    return frozenset(ids)
