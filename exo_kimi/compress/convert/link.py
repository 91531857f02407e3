"""A checkpoint whose weights stay where they are: links to its files, and a config.json and an index that are right."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.fingerprint import stage_fingerprint
from exo_kimi.checkpoint.manifest import StageManifest
from exo_kimi.checkpoint.text_files import CONFIG_NAME
from exo_kimi.compress.convert.texts import card_text, config_text
from exo_kimi.compress.output.job import OutputJob, files_to_copy
from exo_kimi.compress.output.shards import INDEX_NAME
from exo_kimi.errors import UsageError
from exo_kimi.planner.weights.recipes import Recipe


def link_job(
    checkpoint: Checkpoint, output: Path, *, recipe: Recipe | None = None, layers: tuple[int, int] | None = None
) -> OutputJob:
    """An output without a weight of its own.

    config.json says the bits of each packed module as MLX reads them, whatever the source's said.

    Args:
        checkpoint: the source.
        output: new, or of an earlier run.
        recipe: only to make sure that the source has these bits already.
        layers: link only the files that these layers need.

    Raises:
        CheckpointError: the source cannot be served.
        UsageError: the recipe asks for other bits than the source has, or the output is the source.
    """
    if output.resolve() == checkpoint.directory.resolve():
        raise UsageError("the output is the source", where=output, fix="give another directory")
    start, end = layers or (0, None)
    manifest = checkpoint.manifest(start, end)
    if recipe is not None:
        _check_bits(manifest, recipe)
    files = {entry.file for source in manifest.sources for entries in source.parts.values() for entry in entries}
    if manifest.start_layer == 0:
        files |= {entry.file for name, entry in checkpoint.index.tensors.items() if "language_model" not in name}
    tensors = {name: entry for name, entry in checkpoint.index.tensors.items() if entry.file in files}
    weight_map = {name: entry.file for name, entry in sorted(tensors.items())}
    total = sum(entry.nbytes for entry in tensors.values())
    name = checkpoint.directory.resolve().name
    fingerprint = stage_fingerprint(manifest)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return OutputJob(
        directory=output,
        kind="link",
        meaning={
            "source": {"name": name, "fingerprint": fingerprint},
            "layers": [manifest.start_layer, manifest.end_layer],
        },
        shards=(),
        texts={
            CONFIG_NAME: _config(checkpoint, manifest),
            INDEX_NAME: json.dumps(index, indent=2, ensure_ascii=False) + "\n",
            "README.md": card_text(name, [f"Source: {name}, fingerprint {fingerprint[:16]}", "Weights: links to it"]),
        },
        copied=files_to_copy(checkpoint.directory),
        links={file: checkpoint.directory / file for file in sorted(files)},
    )


def _config(checkpoint: Checkpoint, manifest: StageManifest) -> str:
    """The source's config; with MLX's section where it packs modules in a way that MLX has."""
    raw: Mapping[str, Any] = checkpoint.raw_config
    prefix = manifest.config.key_prefix
    if not any(source.quant is not None for source in manifest.sources):
        return json.dumps(raw, indent=2, ensure_ascii=False) + "\n"
    whole = checkpoint.manifest()
    packings = {f"{prefix}{source.spec.path}": source.quant for source in whole.sources if source.spec.quantizable}
    return config_text(raw, packings)


def _check_bits(manifest: StageManifest, recipe: Recipe) -> None:
    other = [source for source in manifest.sources if source.quant != recipe.packing(source.spec)]
    if other:
        first = other[0]
        wanted = recipe.packing(first.spec)
        raise UsageError(
            f"a link has the bits that the source has, and {len(other)} modules differ from recipe {recipe.name}",
            expected=f"{first.spec.path}: {wanted.describe() if wanted else 'plain'}",
            found=first.quant.describe() if first.quant else first.layout,
            where="--link",
            fix="leave --link out to convert, or --recipe to link as it is",
        )
