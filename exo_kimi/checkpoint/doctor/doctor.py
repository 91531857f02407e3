"""Examine a checkpoint directory in one pass: files, names, shapes, bits, config and text files.

Headers only, unless `deep`. `checkpoint.doctor.repair` writes what an examination could derive.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exo_kimi.checkpoint.doctor.checks.bits import check_bits
from exo_kimi.checkpoint.doctor.checks.code import check_code
from exo_kimi.checkpoint.doctor.checks.config import check_config
from exo_kimi.checkpoint.doctor.checks.files import check_files, read_weight_files
from exo_kimi.checkpoint.doctor.checks.generation import check_generation
from exo_kimi.checkpoint.doctor.checks.template import check_template
from exo_kimi.checkpoint.doctor.checks.tokenizer import check_tokenizer
from exo_kimi.checkpoint.doctor.deep import Progress, check_values
from exo_kimi.checkpoint.doctor.findings import Change, Checkup, Diagnosis
from exo_kimi.checkpoint.text_files import CONFIG_NAME
from exo_kimi.errors import ExoKimiError, NotACheckpointError


def doctor(directory: str | Path, *, deep: bool = False, progress: Progress | None = None) -> Diagnosis:
    """Examine a checkpoint directory.

    Args:
        directory: a checkpoint directory, however damaged.
        deep: also read weights and scales, and find NaN and infinity; minutes for half a terabyte.
        progress: called with (bytes read, bytes to read) while reading.

    Raises:
        NotACheckpointError: there is no such directory.
    """
    return diagnose(Path(directory), examine_directory(directory, deep=deep, progress=progress), deep=deep)


def examine_directory(directory: str | Path, *, deep: bool = False, progress: Progress | None = None) -> Checkup:
    """Examine as `doctor` does, and keep what a repair would write.

    Raises:
        NotACheckpointError: there is no such directory.
    """
    root = Path(directory)
    if not root.is_dir():
        raise NotACheckpointError("no such checkpoint directory", found=root, fix="give the folder of config.json")
    checkup = Checkup()
    files = read_weight_files(root)
    reading = check_config(root, files.names, checkup)
    manifest = check_files(root, files, reading, checkup)
    if reading is not None:
        raw, removed = check_code(root, reading.raw, checkup)
        changes = [*reading.changes, *removed]
        if manifest is not None:
            raw, mended = check_bits(raw, manifest, checkup)
            changes += mended
            checkup.notes += [note for note in manifest.notes if "the shapes are followed" not in note]
        if changes:
            checkup.remedy(CONFIG_NAME, json.dumps(raw, indent=2, ensure_ascii=False) + "\n", changes)
    if reading is None:
        _check_texts(root, checkup, vocab_size=None, model_type=None)
    else:
        _check_texts(root, checkup, vocab_size=reading.config.vocab_size, model_type=reading.raw.get("model_type"))
    if deep and manifest is not None:
        check_values(root, manifest.sources, checkup, progress)
    return checkup


def text_errors(directory: str | Path, *, vocab_size: int, model_type: str) -> tuple[ExoKimiError, ...]:
    """Errors that keep the tokenizer, the generation config or the chat template from being served; takes milliseconds.

    Args:
        directory: a checkpoint directory whose weights and config are known to be sound.
        vocab_size: the one in config.json.
        model_type: the outer one in config.json.
    """
    checkup = Checkup()
    _check_texts(Path(directory), checkup, vocab_size=vocab_size, model_type=model_type)
    return tuple(finding.error for finding in checkup.findings if finding.severity == "error")


def _check_texts(root: Path, checkup: Checkup, *, vocab_size: int | None, model_type: Any) -> None:
    tokenizer = check_tokenizer(root, vocab_size, checkup)
    check_generation(root, tokenizer.special, tokenizer.ranks, checkup)
    # The family of a template follows from the config: without one, none is chosen.
    special = None if vocab_size is None else tokenizer.special
    check_template(root, tokenizer.config, special, model_type, checkup)


def diagnose(root: Path, checkup: Checkup, *, deep: bool, changes: Sequence[Change] = ()) -> Diagnosis:
    """Turn a checkup into a diagnosis: errors first."""
    findings = sorted(checkup.findings, key=lambda finding: finding.severity)
    return Diagnosis(
        directory=root, deep=deep, findings=tuple(findings), notes=tuple(checkup.notes), changes=tuple(changes)
    )
