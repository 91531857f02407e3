"""Everything that is wrong with a draft head, and whether it is its target's: `exo-kimi doctor HEAD_DIR --target DIR`.

A head for another revision of its target has the same shapes, loads, and guesses badly; nothing else tells. So a head is held
against its target by the norms that its trainer noted, or by its copy of the target's embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.doctor.deep import check_values
from exo_kimi.checkpoint.doctor.doctor import diagnose, doctor
from exo_kimi.checkpoint.doctor.findings import Checkup, Diagnosis
from exo_kimi.checkpoint.doctor.hashes import hub_hashes, listed_hashes
from exo_kimi.checkpoint.doctor.repair import repair
from exo_kimi.checkpoint.drafts.manifest import DraftManifest, examine_draft
from exo_kimi.checkpoint.drafts.report import is_draft
from exo_kimi.checkpoint.drafts.vocabulary import read_bytes_of
from exo_kimi.checkpoint.fingerprint import norms_fingerprint
from exo_kimi.checkpoint.index import TensorEntry, read_shards
from exo_kimi.checkpoint.packing import Floats, dequantize_affine, restore
from exo_kimi.checkpoint.safetensors_io import StoredTensor
from exo_kimi.checkpoint.shards import find_shards
from exo_kimi.checkpoint.sources import ModuleSource
from exo_kimi.errors import CheckpointError, CheckpointProblems, ConfigError, MissingTensorError, UsageError

SAMPLED_ROWS = 64
LIKE = 0.9
"""Least mean cosine of embedding rows that are the same before rounding: 3 bits leave 0.97, other models' rows have about 0."""
_IDS_FIX = "write those into config.json and compare, if few guesses are right"
_WORDS = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorOptions:
    """What `doctor` was asked for: repair, reading the weights, hashes to hold files against, and a head's target."""

    fix: bool = False
    deep: bool = False
    sha256: Path | None = None
    target: Path | None = None


def examine_any(directory: Path, options: DoctorOptions) -> Diagnosis:
    """Examine a checkpoint's directory, or a head's.

    Raises:
        NotACheckpointError: there is no such directory.
        UsageError: a target for what is no head, a repair of a head, or a list of hashes that cannot be read.
    """
    if is_draft(directory):
        return doctor_draft(directory, options)
    if options.target is not None:
        raise UsageError("--target is for a draft head", found=f"{directory} is none", fix="leave --target out")
    return (repair if options.fix else doctor)(directory, deep=options.deep, sha256=options.sha256)


def doctor_draft(directory: Path, options: DoctorOptions) -> Diagnosis:
    """Examine a head's directory, and whether it fits its target.

    Raises:
        UsageError: a repair is asked for, or a list of hashes cannot be read.
    """
    if options.fix:
        raise UsageError(
            "nothing of a draft head can be derived", found="--fix", fix="copy what is damaged again, without --fix"
        )
    checkup, deep = Checkup(), options.deep or options.sha256 is not None
    listed = {} if options.sha256 is None else listed_hashes(options.sha256)
    try:
        manifest, problems = examine_draft(directory)
    except CheckpointProblems as error:
        for each in error.problems:
            checkup.error(each)
        return diagnose(directory, checkup, deep=deep)
    except CheckpointError as error:
        checkup.error(error)
        return diagnose(directory, checkup, deep=deep)
    for problem in problems:
        checkup.error(problem)
    checkup.notes += manifest.notes
    if deep:
        tensors = read_shards(find_shards(directory)).tensors
        check_values(directory, tensors, manifest.sources, checkup, hashes={**hub_hashes(directory), **listed})
    if options.target is None:
        checkup.notes.append("whether it is its target's head is not looked at; --target DIR does")
    else:
        _check_target(manifest, Checkpoint(options.target), checkup)
    return diagnose(directory, checkup, deep=deep)


def _check_target(manifest: DraftManifest, target: Checkpoint, checkup: Checkup) -> None:
    try:
        manifest.config.check_target(target.config, where=manifest.directory)
        layers = manifest.config.feature_layers(target.config.num_hidden_layers)
    except CheckpointProblems as error:
        for each in error.problems:
            checkup.error(each)
        return
    except CheckpointError as error:
        checkup.error(error)
        return
    checkup.notes.append(f"it reads what enters layers {', '.join(map(str, layers))} of its target")
    if manifest.config.layer_ids is not None and manifest.config.target_fingerprint is None:
        later = [layer + 1 for layer in layers]
        checkup.notes.append(f"programs differ: by SpecForge and sglang the same ids would be {later}; {_IDS_FIX}")
    try:
        told = _compare_norms(manifest, target, checkup) or _compare_embedding(manifest, target, checkup)
    except MissingTensorError:
        told = False  # the target is a share
    except CheckpointError as error:
        checkup.error(error)
        return
    if not told:
        checkup.notes.append(
            "nothing in it says which revision of its target it was trained on; acceptance tells: `exo-kimi bench drafts`"
        )


def _compare_norms(manifest: DraftManifest, target: Checkpoint, checkup: Checkup) -> bool:
    """By the fingerprint that our trainer notes; False where the head has none."""
    noted = manifest.config.target_fingerprint
    if noted is None:
        return False
    found = norms_fingerprint(target.manifest())
    if noted == found:
        checkup.notes.append("it was trained on this target: the norms are the same")
    else:
        checkup.error(
            ConfigError(
                "this head was trained on another model than the target",
                expected=f"a target whose norms have the hash {noted[:16]}, of whatever bits",
                found=found[:16],
                where=target.directory,
                fix="give the head that was trained for this target, or the target that it was trained on",
            )
        )
    return True


def _compare_embedding(manifest: DraftManifest, target: Checkpoint, checkup: Checkup) -> bool:
    """By some rows of the embedding, which heads copy from their target; False where one of them has none to read."""
    own = next((source for source in manifest.sources if source.spec.path == "embed_tokens"), None)
    theirs = next((each for each in target.manifest(0, 1).sources if each.spec.path == "model.embed_tokens"), None)
    if own is None or theirs is None or {own.layout, theirs.layout} - {"plain", "mlx"}:
        return False
    rows = np.linspace(0, manifest.config.vocab_size - 1, SAMPLED_ROWS).astype(np.int64)
    ours, its = _rows(manifest.directory, own, rows), _rows(target.directory, theirs, rows)
    if ours is None or its is None:
        return False
    if np.array_equal(ours, its):
        checkup.notes.append(f"{SAMPLED_ROWS} rows of its embedding are the target's")
        return True
    norms = np.linalg.norm(ours, axis=-1) * np.linalg.norm(its, axis=-1)
    likeness = float(((ours * its).sum(-1) / np.maximum(norms, 1e-20)).mean())
    if likeness < LIKE:
        checkup.error(
            ConfigError(
                "the head's embedding is another model's than the target's",
                expected=f"rows that point where the target's do, as those of a head of it (cosine over {LIKE})",
                found=f"cosine {likeness:.2f} on average of {SAMPLED_ROWS} rows",
                where=manifest.directory,
                fix="give the head that was trained for this target",
            )
        )
    elif own.layout == theirs.layout == "plain":
        checkup.warn(
            ConfigError(
                "the head's embedding is nearly the target's, and not the same: it may be of another revision",
                expected="the same rows, as heads copy them",
                found=f"cosine {likeness:.4f} on average of {SAMPLED_ROWS} rows",
                where=manifest.directory,
                fix="look for the head of this revision; acceptance tells which is better: `exo-kimi bench drafts`",
            )
        )
    else:
        checkup.notes.append(f"rows of its embedding are like the target's, as far as bits tell: cosine {likeness:.3f}")
    return True


def _rows(root: Path, source: ModuleSource, rows: NDArray[np.int64]) -> Floats | None:
    """Some rows of an embedding in float32; None of floats that have scales of bytes, and of what is not here."""
    parts = {part: entries[0] for part, entries in source.parts.items()}
    if not all(entry.is_here for entry in parts.values()):
        return None
    if source.quant is None:
        return _floats(root, parts["weight"], rows)
    if source.quant.mode != "affine":
        return None
    codes = _raw(root, parts["weight"], rows).view("<u4")
    scales, biases = (_floats(root, parts[part], rows) for part in ("scales", "biases"))
    return dequantize_affine(codes, scales, biases, bits=source.quant.bits, group_size=source.quant.group_size)


def _floats(root: Path, entry: TensorEntry, rows: NDArray[np.int64]) -> Floats:
    return restore(StoredTensor(entry.dtype, _raw(root, entry, rows).view(_WORDS[entry.dtype])))


def _raw(root: Path, entry: TensorEntry, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The bytes of some rows of a tensor, (rows, bytes)."""
    size = entry.nbytes // entry.shape[0]
    pieces = [read_bytes_of(root, entry, int(row) * size, size) for row in rows]
    return np.frombuffer(b"".join(pieces), np.uint8).reshape(len(rows), size)
