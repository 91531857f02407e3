"""A conversion before it runs: what is read, what is written, and how many bytes that is."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.fingerprint import stage_fingerprint
from exo_kimi.checkpoint.index import CheckpointIndex
from exo_kimi.checkpoint.keys import SkippedKey, parse_key
from exo_kimi.checkpoint.manifest import StageManifest
from exo_kimi.checkpoint.safetensors_io import TensorEntry
from exo_kimi.checkpoint.text_files import CONFIG_NAME
from exo_kimi.compress.convert.affine import Rounding
from exo_kimi.compress.convert.targets import CARRIED_KINDS, ModuleTarget, targets_of
from exo_kimi.compress.convert.texts import card_text, config_text
from exo_kimi.compress.output.job import OutputJob, files_to_copy
from exo_kimi.compress.output.shards import INDEX_NAME, SHARD_BYTES, OutputTensor, cut_shards, index_text
from exo_kimi.errors import UsageError
from exo_kimi.planner.weights.recipes import Recipe
from exo_kimi.units import format_bytes

Importance = Mapping[str, NDArray[np.float32]]

_ARITHMETIC = 2
"""Raised when the same source and recipe give other bytes than before: an output that was begun is then not continued."""

_CARRIED = "vision"  # how the reasons begin for tensors that a text model skips and a converted checkpoint keeps


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Layers [start, end) of a checkpoint, as a recipe has them.

    Args:
        manifest: the source's modules.
        recipe: bits of each.
        rounding: how codes are chosen.
        targets: the modules to write, in the order of the model.
        carried: tensors that are copied byte for byte: the vision tower and its projector, convolutions and decays.
        left_out: reasons -> number of tensors of the source that are not written.
        job: the output.
        importance: mean squares of the inputs' columns by module path, see `read_importance`; codes have the least error by them.
    """

    manifest: StageManifest
    recipe: Recipe
    rounding: Rounding
    targets: tuple[ModuleTarget, ...]
    carried: tuple[TensorEntry, ...]
    left_out: Mapping[str, int]
    job: OutputJob
    importance: Importance = field(default_factory=dict)

    def importance_of(self, target: ModuleTarget, matrix: int) -> NDArray[np.float32] | None:
        """(in,) of one matrix of a target; None where all columns are alike. embed_q's are kv_b_proj's rows: unknown."""
        found = self.importance.get(target.source.spec.path)
        if found is None or (target.heads is not None and target.spec.path.endswith(".embed_q")):
            return None
        return found[matrix] if found.ndim == 2 else found

    @property
    def text_bytes(self) -> int:
        """Bytes of the text model's tensors: what the planner counts."""
        return sum(target.nbytes for target in self.targets)

    @property
    def carried_bytes(self) -> int:
        """Bytes that are copied as they are, beside the text model."""
        return sum(entry.nbytes for entry in self.carried)

    @cached_property
    def target_of(self) -> Mapping[str, ModuleTarget]:
        """Targets by the name of their weight."""
        return {target.tensors[0].name: target for target in self.targets}

    @cached_property
    def carried_of(self) -> Mapping[str, TensorEntry]:
        """Carried tensors by name."""
        return {entry.name: entry for entry in self.carried}

    def notes(self) -> list[str]:
        """What a user should know beside bytes and time."""
        notes = list(self.manifest.notes)
        narrowed = sum(target.narrowed for target in self.targets)
        if narrowed:
            notes.append(f"{narrowed} modules of plain float32 become {self.targets[0].dtype} or packed")
        if self.carried:
            size = format_bytes(self.carried_bytes)
            what = "convolutions and decays" if self.manifest.config.has_states else "the vision tower"
            notes.append(f"{len(self.carried)} tensors of {what} are carried byte for byte ({size})")
        notes += [f"{count:,} tensors are left out: {reason}" for reason, count in sorted(self.left_out.items())]
        kept = [t for t in self.targets if t.spec.path.endswith(".kv_b_proj") and t.packing is not None]
        if kept:
            notes.append(
                f"kv_b_proj stays one module in {len(kept)} layers: exo-kimi splits it exactly, mlx-lm quantizes it again"
            )
        skipped = {f"{count:,} tensor{'' if count == 1 else 's'} skipped: " for count in self._all_skipped.values()}
        return [note for note in notes if not note.startswith(tuple(skipped))] if skipped else notes

    @property
    def _all_skipped(self) -> Mapping[str, int]:
        return {**self.left_out, "carried": len(self.carried)}


def make_conversion(
    checkpoint: Checkpoint,
    output: Path,
    recipe: Recipe,
    *,
    layers: tuple[int, int] | None = None,
    rounding: Rounding = "search",
    keep_kv_b: bool = False,
    shard_bytes: int = SHARD_BYTES,
    importance: Importance | None = None,
) -> Conversion:
    """Plan a conversion from headers alone.

    Args:
        checkpoint: the source, in any layout that we load.
        output: a directory, new or of an interrupted run.
        recipe: bits of each module.
        layers: a half-open range; all by default.
        rounding: `search` for the least error, `mlx` for mx.quantize's codes.
        keep_kv_b: leave kv_b_proj whole; see `targets_of`.
        shard_bytes: most bytes of a file.
        importance: see `Conversion`.

    Raises:
        CheckpointError: the source cannot be converted; a tensor of no known meaning is an error, by name.
        SplitError: there is no such layer range.
        UsageError: the recipe does not fit the model, or the output is the source.
    """
    if output.resolve() == checkpoint.directory.resolve():
        raise UsageError("the output is the source", where=output, fix="give another directory")
    start, end = layers or (0, None)
    manifest = checkpoint.manifest(start, end)
    targets = targets_of(manifest, recipe, keep_kv_b=keep_kv_b)
    tower, left_out = _beside_the_text(checkpoint.index, carry=manifest.start_layer == 0)
    carried = (*tower, *_as_they_are(manifest))
    groups: list[Sequence[OutputTensor]] = [target.tensors for target in targets]
    groups += [[OutputTensor(entry.name, entry.dtype, entry.shape)] for entry in carried]
    shards = cut_shards(groups, shard_bytes=shard_bytes)
    packings = {target.name: target.packing for target in targets if target.spec.quantizable}
    name = checkpoint.directory.resolve().name
    whole = (manifest.start_layer, manifest.end_layer) == (0, manifest.config.num_hidden_layers)
    meaning: dict[str, Any] = {
        "source": {"name": name, "fingerprint": stage_fingerprint(manifest)},
        "recipe": {"name": recipe.name, "hash": recipe.hash},
        "layers": [manifest.start_layer, manifest.end_layer],
        "rounding": rounding,
        "arithmetic": _ARITHMETIC,
        **({"calibration": _digest(importance)} if importance else {}),
    }
    facts = [
        f"Source: {name}, fingerprint {meaning['source']['fingerprint'][:16]}",
        f"Bits: {recipe.title} (recipe {recipe.name})",
        "Codes: least squared error for each group" if rounding == "search" else "Codes: mx.quantize's",
        *(["Columns count as calibration texts use them"] if importance else []),
        *([] if whole else [f"Layers {manifest.start_layer}:{manifest.end_layer} only (half-open)"]),
    ]
    texts = {
        CONFIG_NAME: config_text(checkpoint.raw_config, packings, dtype=targets[0].dtype),
        INDEX_NAME: index_text(shards),
        "README.md": card_text(f"{name}, {recipe.title}", facts),
    }
    job = OutputJob(
        directory=output,
        kind="convert",
        meaning=meaning,
        shards=shards,
        texts=texts,
        copied=files_to_copy(checkpoint.directory),
    )
    return Conversion(
        manifest=manifest,
        recipe=recipe,
        rounding=rounding,
        targets=targets,
        carried=carried,
        left_out=left_out,
        job=job,
        importance=importance or {},
    )


def _as_they_are(manifest: StageManifest) -> list[TensorEntry]:
    """Tensors that no recipe speaks of, small ones of Kimi Delta Attention, which keep their names and shapes."""
    sources = [source for source in manifest.sources if source.spec.kind in CARRIED_KINDS]
    return [entry for source in sources for entries in source.parts.values() for entry in entries]


def _digest(importance: Importance) -> str:
    digest = hashlib.sha256()
    for path in sorted(importance):
        digest.update(path.encode() + importance[path].tobytes())
    return digest.hexdigest()


def _beside_the_text(index: CheckpointIndex, *, carry: bool) -> tuple[tuple[TensorEntry, ...], dict[str, int]]:
    """Tensors of the tower to carry, and the number of others that a text model skips, by reason."""
    left_out = Counter(index.skipped)
    if not carry or not any(reason.startswith(_CARRIED) for reason in left_out):
        return (), {reason: count for reason, count in left_out.items() if not reason.startswith(_CARRIED)}
    carried = []
    for entry in index.tensors.values():
        key = parse_key(entry.name)
        if isinstance(key, SkippedKey) and key.reason.startswith(_CARRIED):
            carried.append(entry)
            left_out[key.reason] -= 1
    return tuple(carried), {reason: count for reason, count in left_out.items() if count}
