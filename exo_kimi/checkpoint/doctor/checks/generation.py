"""Check generation_config.json: the stop ids and sampling numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exo_kimi.arch.numbers import is_number
from exo_kimi.checkpoint.doctor.checks.tokenizer import RESERVED, read_object
from exo_kimi.checkpoint.doctor.findings import Checkup
from exo_kimi.errors import TokenizerError

GENERATION_FILE = "generation_config.json"
TURN_END = "<|im_end|>"
_HIGHEST = (("temperature", 100.0), ("top_p", 1.0))


def check_generation(root: Path, special: Mapping[str, int] | None, ranks: int | None, checkup: Checkup) -> None:
    """Note every finding about generation_config.json, and the file as it should be, where the tokenizer could be read.

    Args:
        root: the checkpoint.
        special: control tokens by name; None where the tokenizer cannot be read.
        ranks: number of ordinary tokens.
        checkup: gets the findings.
    """
    turn_end = (special or {}).get(TURN_END)
    known = turn_end is not None
    if not (root / GENERATION_FILE).exists():
        checkup.warn(
            TokenizerError(
                f"{GENERATION_FILE} is missing",
                expected=f"eos_token_id with the id of {TURN_END}",
                where=GENERATION_FILE,
                fix=f"exo-kimi stops at {TURN_END} by its name; other programs may not stop",
            ),
            fixable=known,
        )
        raw: dict[str, Any] | None = None
    else:
        raw = read_object(root, GENERATION_FILE, checkup, fixable=known)
    for key, highest in _HIGHEST:
        value = (raw or {}).get(key)
        if value is not None and not (is_number(value, float) and 0 <= value <= highest):
            checkup.error(
                TokenizerError(
                    f"{GENERATION_FILE} has a {key} out of range",
                    expected=f"0 to {highest:g}",
                    found=ascii(value),
                    where=GENERATION_FILE,
                    fix="copy it from the model's original repository, or remove the key",
                )
            )
    if special is None or ranks is None or turn_end is None:
        return
    kept = [] if raw is None else _check_stop_ids(raw.get("eos_token_id"), ranks, turn_end, checkup)
    if raw is not None and kept is None:
        return
    ids = [turn_end, *(token for token in kept or [] if token != turn_end)]
    mended = {**(raw or {}), "eos_token_id": ids if len(ids) > 1 else turn_end}
    if raw is None and "[BOS]" in special:
        mended = {"bos_token_id": special["[BOS]"], **mended}
    before = None if raw is None else raw.get("eos_token_id")
    change = f"eos_token_id: {'nothing' if before is None else ascii(before)} -> {mended['eos_token_id']}"
    checkup.remedy(GENERATION_FILE, json.dumps(mended, indent=2, ensure_ascii=False) + "\n", [change])


def _check_stop_ids(value: object, ranks: int, turn_end: int, checkup: Checkup) -> list[int] | None:
    """The stop ids that are worth keeping, or None when there is nothing to mend."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    kept = [token for token in ids if type(token) is int and ranks <= token < ranks + RESERVED]
    if len(kept) < len(ids):
        odd = next(token for token in ids if token not in kept or type(token) is not int)
        checkup.error(
            TokenizerError(
                f"{GENERATION_FILE} has an eos_token_id that is no control token",
                expected=f"ids from {ranks} to {ranks + RESERVED - 1}",
                found=ascii(odd)[:80],
                where=GENERATION_FILE,
                fix="answers would stop in the middle, or never",
            ),
            fixable=True,
        )
    if turn_end not in kept:
        checkup.warn(
            TokenizerError(
                f"{GENERATION_FILE} does not stop at {TURN_END}",
                expected=f"eos_token_id with {turn_end}",
                found=ascii(value)[:80],
                where=GENERATION_FILE,
                fix=f"exo-kimi stops at {TURN_END} by its name; other programs may not stop",
            ),
            fixable=True,
        )
    return None if len(kept) == len(ids) and turn_end in kept else kept
