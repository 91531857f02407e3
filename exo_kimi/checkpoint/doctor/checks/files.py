"""Check the weight files and `model.safetensors.index.json`.

Headers are read as the index lists them and, because they can replace it, as if there were none.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exo_kimi.checkpoint.doctor.checks.config import ConfigReading
from exo_kimi.checkpoint.doctor.findings import Checkup
from exo_kimi.checkpoint.index import WeightFileTensors, read_shards, sort_tensors
from exo_kimi.checkpoint.manifest import StageManifest, examine
from exo_kimi.checkpoint.shards import INDEX_NAME, find_shards
from exo_kimi.checkpoint.shares import share_notes
from exo_kimi.checkpoint.text_files import read_json
from exo_kimi.checkpoint.vision import tower_findings
from exo_kimi.errors import CheckpointError, MissingTensorError, TensorFileError, UnexpectedTensorError


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFiles:
    """Tensors of the weight files, as the index lists them and as if there were no index, or why they cannot be listed.

    `indexed` is None where the index cannot be used; `bare` where there is no index, or no weights.
    """

    indexed: WeightFileTensors | None
    bare: WeightFileTensors | None
    fatal: tuple[CheckpointError, ...]

    @property
    def names(self) -> frozenset[str]:
        """The names of all tensors that could be read."""
        found = self.indexed or self.bare
        return frozenset(found.tensors if found else ())


def read_weight_files(root: Path) -> WeightFiles:
    """Read every header, following the index where it can be followed."""
    has_index = (root / INDEX_NAME).exists()
    fatal: list[CheckpointError] = []
    read: dict[bool, WeightFileTensors] = {}
    for use_index in (True, False) if has_index else (True,):
        # The index agrees with sound headers: files that it does not name do not matter.
        if not use_index and True in read and not read[True].problems:
            break
        try:
            read[use_index] = read_shards(find_shards(root, use_index=use_index))
        except CheckpointError as error:
            if (type(error), error.what) not in {(type(other), other.what) for other in fatal}:
                fatal.append(error)
    return WeightFiles(indexed=read.get(True), bare=read.get(False), fatal=tuple(fatal))


def check_files(
    root: Path, weight_files: WeightFiles, reading: ConfigReading | None, checkup: Checkup
) -> StageManifest | None:
    """Note every finding about files, names, shapes and dtypes, and the index as the headers have it.

    Returns:
        What could be resolved; None without an architecture or without weights.
    """
    by_index = _judge(root, weight_files.indexed, reading)
    bare = _judge(root, weight_files.bare, reading)
    problems, manifest = by_index or bare or ([], None)
    rebuilt = bare if weight_files.bare is not None and bare is not None and _complete(bare[0]) else None
    curable = (
        set()
        if rebuilt is None
        else {_key(error) for error in (*weight_files.fatal, *problems)} - {_key(error) for error in rebuilt[0]}
    )
    for error in (*weight_files.fatal, *problems):
        checkup.error(error, fixable=_key(error) in curable)
    if curable and weight_files.bare is not None:
        _remedy(root, weight_files.bare, checkup, "rebuilt from the headers of the weight files")
    elif weight_files.indexed is not None and not problems:
        _check_index(root, weight_files.indexed, checkup)
    if manifest is None or rebuilt is None or not curable:
        return manifest
    return rebuilt[1]


def _judge(
    root: Path, found: WeightFileTensors | None, reading: ConfigReading | None
) -> tuple[list[CheckpointError], StageManifest | None] | None:
    if found is None:
        return None
    if reading is None:
        return [problem.error for problem in found.problems], None
    index = sort_tensors(root, reading.config, reading.raw, found)
    manifest, problems = examine(index)
    note, of_tower = tower_findings(index)
    return [*problems, *of_tower], replace(manifest, notes=(*manifest.notes, *note, *share_notes(index)))


def _complete(problems: list[CheckpointError]) -> bool:
    """Whether the files have every tensor of the model once: only then may the index be written from them."""
    return not any(isinstance(p, (MissingTensorError, TensorFileError, UnexpectedTensorError)) for p in problems)


def _key(error: CheckpointError) -> tuple[object, ...]:
    return type(error), error.what, error.found, error.where


def _check_index(root: Path, found: WeightFileTensors, checkup: Checkup) -> None:
    """Check the total_size of an index whose names are right, and that several files have an index."""
    total = sum(entry.nbytes for entry in found.tensors.values())
    if not (root / INDEX_NAME).exists():
        files = {entry.file for entry in found.tensors.values()}
        # A share has none, for other programs could not run it.
        if len(files) > 1 and all(entry.is_here for entry in found.tensors.values()):
            checkup.warn(
                TensorFileError(
                    f"{INDEX_NAME} is missing",
                    expected=f"an index of {len(found.tensors):,} tensors in {len(files)} files",
                    where=INDEX_NAME,
                    fix="exo-kimi reads the headers; other programs need it",
                ),
                fixable=True,
            )
            _remedy(root, found, checkup, "written from the headers of the weight files")
        return
    stated = _metadata(root).get("total_size")
    if stated is not None and stated != total:
        checkup.warn(
            TensorFileError(
                f"{INDEX_NAME} has another total_size than the files",
                expected=f"{total:,} bytes of tensors",
                found=ascii(stated),
                where=INDEX_NAME,
            ),
            fixable=True,
        )
        _remedy(root, found, checkup, f"metadata.total_size: {stated!a} -> {total}")


def _remedy(root: Path, found: WeightFileTensors, checkup: Checkup, change: str) -> None:
    index = {
        "metadata": {**_metadata(root), "total_size": sum(entry.nbytes for entry in found.tensors.values())},
        "weight_map": {name: entry.file for name, entry in sorted(found.tensors.items())},
    }
    checkup.remedy(INDEX_NAME, json.dumps(index, indent=2) + "\n", [change])


def _metadata(root: Path) -> dict[str, Any]:
    """The index's `metadata`; empty where the index cannot be read."""
    try:
        metadata = read_json(root / INDEX_NAME)["metadata"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return metadata if isinstance(metadata, dict) else {}
