"""Check for code that a checkpoint brings along, which exo-kimi never runs and other programs do."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exo_kimi.checkpoint.doctor.checks.tokenizer import TOKENIZER_CONFIG
from exo_kimi.checkpoint.doctor.findings import Checkup
from exo_kimi.checkpoint.foreign_code import MODEL_FILE_KEY, code_files, code_keys
from exo_kimi.checkpoint.text_files import CONFIG_NAME, read_json
from exo_kimi.errors import ConfigError

_SHOWN = 5


def check_code(root: Path, raw: Mapping[str, Any], checkup: Checkup) -> tuple[Mapping[str, Any], list[str]]:
    """Note code: what Moonshot publishes too as a note, what mlx-lm runs unasked as a warning.

    Args:
        root: the checkpoint.
        raw: config.json.
        checkup: gets the findings.

    Returns:
        config.json without what mlx-lm would run, and how it differs, in words.
    """
    named = [f"{path} in {CONFIG_NAME}" for path in code_keys(raw)]
    with contextlib.suppress(OSError, ValueError):  # a finding of the tokenizer's check
        named += [f"{path} in {TOKENIZER_CONFIG}" for path in code_keys(read_json(root / TOKENIZER_CONFIG))]
    found = [*code_files(root), *named]
    if found:
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        checkup.notes.append(
            f"code in the checkpoint, which exo-kimi never runs: {', '.join(found[:_SHOWN])}{more}; other programs may, "
            "exo runs tokenization_kimi.py unasked (`exo-kimi exo prepare` hands on none of it)"
        )
    if raw.get(MODEL_FILE_KEY) is None:
        return raw, []
    checkup.warn(
        ConfigError(
            f"{CONFIG_NAME} names a program that mlx-lm and exo run unasked",
            expected=f"no {MODEL_FILE_KEY}: every Kimi K2 is an architecture that they know",
            found=f"{MODEL_FILE_KEY} {raw[MODEL_FILE_KEY]!a}"[:120],
            where=CONFIG_NAME,
            fix="do not give this checkpoint to other programs before --fix has removed it",
        ),
        fixable=True,
    )
    return {key: value for key, value in raw.items() if key != MODEL_FILE_KEY}, [f"{MODEL_FILE_KEY}: removed"]
