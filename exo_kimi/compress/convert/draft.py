"""A draft head with other bits: `exo-kimi convert HEAD_DIR OUT --recipe`. It fits memory, so it is written in one piece."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exo_kimi.checkpoint.drafts.manifest import DraftManifest, resolve_draft
from exo_kimi.checkpoint.drafts.vocabulary import read_integers
from exo_kimi.checkpoint.index import TensorEntry
from exo_kimi.checkpoint.safetensors_io import BITS_PER_ELEMENT, StoredTensor, write_file
from exo_kimi.checkpoint.text_files import CONFIG_NAME
from exo_kimi.compress.convert.affine import Rounding
from exo_kimi.compress.convert.encoding import encode
from exo_kimi.compress.convert.rows import SourceRows
from exo_kimi.compress.convert.targets import ModuleTarget
from exo_kimi.compress.convert.texts import config_text
from exo_kimi.compress.output.shards import OutputTensor
from exo_kimi.compress.ranges import RangeReader
from exo_kimi.errors import UsageError
from exo_kimi.planner.weights.recipes import Recipe
from exo_kimi.units import format_bytes

_FILE = "model.safetensors"
_ARRAYS: dict[str, Any] = {"U32": np.uint32, "U8": np.uint8, "BF16": np.uint16, "F16": np.float16, "F32": np.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftConversion:
    """What becomes of a head.

    Args:
        directory: the source, in any layout that is loaded.
        output: a new directory.
        recipe: bits of each module.
        rounding: how codes are chosen.
        dry_run: say bytes, and write nothing.
    """

    directory: Path
    output: Path
    recipe: Recipe
    rounding: Rounding = "search"
    dry_run: bool = False


def convert_draft(conversion: DraftConversion) -> str:
    """Write a head as a recipe has it; returns what to print. Ids of the vocabulary are carried as they are.

    Raises:
        CheckpointError: the source is no head, or damaged.
        UsageError: the output exists or cannot be written, or groups of the recipe do not divide a module's rows.
    """
    manifest = resolve_draft(conversion.directory)
    targets = _targets(manifest, conversion.recipe)
    kinds = Counter(
        "plain" if target.packing is None else target.packing.describe()
        for target in targets
        if target.spec.quantizable
    )
    told = ", ".join(f"{count} modules {kind}" for kind, count in kinds.most_common())
    size = format_bytes(sum(target.nbytes for target in targets))
    if conversion.dry_run:
        return f"tensors   {size}\nbits      {told}"
    output = conversion.output
    if output.exists():
        raise UsageError("the output exists", where=output, fix="give a new directory")
    tensors = _encoded(manifest, targets, conversion.rounding)
    config = config_text(
        manifest.raw_config,
        {target.name: target.packing for target in targets if target.spec.quantizable},
        dtype=targets[0].dtype,
    )
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        write_file(partial / _FILE, tensors, metadata={"format": "mlx"})
        (partial / CONFIG_NAME).write_text(config, encoding="utf-8")
        partial.replace(output)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UsageError("the head cannot be written", found=error.strerror, where=output) from error
    return f"{size} of a draft head in {output}: {told}"


def _targets(manifest: DraftManifest, recipe: Recipe) -> tuple[ModuleTarget, ...]:
    """Every module as it is written, under the names of `arch.draft_modules`.

    Raises:
        UsageError: a group size of the recipe does not divide a module's rows.
    """
    dtypes = [entry.dtype for source in manifest.sources for entry in source.parts.get("weight", ())]
    dtype = "F16" if "F16" in dtypes and "BF16" not in dtypes else "BF16"
    targets = [ModuleTarget(source.spec, source, recipe.packing(source.spec), dtype, "") for source in manifest.sources]
    for target in targets:
        if target.packing is not None and target.spec.shape[-1] % target.packing.group_size:
            raise UsageError(
                f"recipe {recipe.name}: groups do not divide the rows of {target.spec.path}",
                expected=f"a group_size that divides {target.spec.shape[-1]}",
                found=target.packing.group_size,
            )
    return tuple(targets)


def _encoded(manifest: DraftManifest, targets: tuple[ModuleTarget, ...], rounding: Rounding) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    with RangeReader(manifest.directory) as reader:
        for target in targets:
            rows = SourceRows(reader, target.source)
            made = {tensor.name: np.empty(tensor.nbytes, np.uint8) for tensor in target.tensors}
            for block in target.blocks():
                for piece in encode(target, rows, block, rounding):
                    data = np.ascontiguousarray(piece.data).reshape(-1).view(np.uint8)
                    made[piece.name][piece.at : piece.at + len(data)] = data
            tensors |= {tensor.name: _stored(tensor, made) for tensor in target.tensors}
    for name, entry in manifest.maps.items():
        tensors[name] = _carried(manifest, entry)
    return tensors


def _stored(tensor: OutputTensor, made: Mapping[str, NDArray[np.uint8]]) -> StoredTensor:
    return StoredTensor(tensor.dtype, made[tensor.name].view(_ARRAYS[tensor.dtype]).reshape(tensor.shape))


def _carried(manifest: DraftManifest, entry: TensorEntry) -> StoredTensor:
    wide = BITS_PER_ELEMENT[entry.dtype] > 8
    values = read_integers(manifest.directory, entry)
    return StoredTensor(entry.dtype, values if wide else values.astype(np.uint8))
