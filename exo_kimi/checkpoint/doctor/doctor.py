"""Examine a checkpoint directory in one pass: files, names, shapes, bits, config and text files.

Headers only, unless `deep`. `checkpoint.doctor.repair` writes what an examination could derive.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from exo_kimi.checkpoint.doctor.checks.bits import check_bits
from exo_kimi.checkpoint.doctor.checks.code import check_code
from exo_kimi.checkpoint.doctor.checks.config import check_config
from exo_kimi.checkpoint.doctor.checks.files import check_files, read_weight_files
from exo_kimi.checkpoint.doctor.checks.generation import check_generation
from exo_kimi.checkpoint.doctor.checks.template import check_template
from exo_kimi.checkpoint.doctor.checks.tokenizer import check_tokenizer
from exo_kimi.checkpoint.doctor.deep import Progress, check_other_hashes, check_values
from exo_kimi.checkpoint.doctor.findings import Change, Checkup, Diagnosis
from exo_kimi.checkpoint.doctor.hashes import hub_hashes, listed_hashes
from exo_kimi.checkpoint.text_files import CONFIG_NAME
from exo_kimi.errors import ExoKimiError, NotACheckpointError, TensorFileError


def doctor(
    directory: str | Path, *, deep: bool = False, sha256: Path | None = None, progress: Progress | None = None
) -> Diagnosis:
    """Examine a checkpoint directory.

    Args:
        directory: a checkpoint directory, however damaged.
        deep: also read the weights, and find NaN, zeros, copies and files that are not the hub's; minutes for half a terabyte.
        sha256: a list as sha256sum writes it, for files of which the hub's downloader left no hash; asks for `deep`.
        progress: called with (bytes read, bytes to read) while reading.

    Raises:
        NotACheckpointError: there is no such directory.
        UsageError: the list cannot be read.
    """
    checkup = examine_directory(directory, deep=deep, sha256=sha256, progress=progress)
    return diagnose(Path(directory), checkup, deep=deep or sha256 is not None)


def examine_directory(
    directory: str | Path, *, deep: bool = False, sha256: Path | None = None, progress: Progress | None = None
) -> Checkup:
    """Examine as `doctor` does, and keep what a repair would write.

    Raises:
        NotACheckpointError: there is no such directory.
        UsageError: the list cannot be read.
    """
    root = Path(directory)
    if not root.is_dir():
        raise NotACheckpointError("no such checkpoint directory", found=root, fix="give the folder of config.json")
    listed = {} if sha256 is None else listed_hashes(sha256)
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
    found = files.indexed or files.bare
    if (deep or listed) and found is not None:
        hashes = {**hub_hashes(root), **listed}
        sources = () if manifest is None else manifest.sources
        check_values(root, found.tensors, sources, checkup, hashes=hashes, progress=progress)
        weights = {entry.file for entry in found.tensors.values()}
        check_other_hashes(root, hashes, checkup, weights=weights)
        _note_hashes(root, hashes, weights, checkup)
    return checkup


def _note_hashes(root: Path, hashes: Mapping[str, str], weights: Collection[str], checkup: Checkup) -> None:
    """Say of how many weight files the hash was known, and which files of a list are not there."""
    known = sum(file in hashes for file in weights)
    checkup.notes.append(
        f"SHA-256 of {known:,} of {len(weights):,} weight files compared with the hub's"
        if known
        else "no SHA-256 of the hub's was at hand; --sha256 FILE gives one"
    )
    for file in sorted(set(hashes) - set(weights)):
        if file.endswith(".safetensors") and not (root / file).is_file():
            checkup.error(
                TensorFileError(
                    f"{file} is missing: its SHA-256 is listed",
                    expected="the file",
                    found="no such file",
                    where=file,
                    fix="download or copy this file",
                )
            )


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
