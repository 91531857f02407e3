"""`exo-kimi convert --adapter`: a checkpoint with an adapter in its weights. Every tensor but those of the adapted modules is the
source's, byte for byte, under the same name in the same file; those have the source's layout and bits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exo_kimi.checkpoint.adapters.manifest import AdapterManifest, LowRank, resolve_adapter
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.fingerprint import stage_fingerprint
from exo_kimi.checkpoint.packing import (
    Floats,
    dequantize_affine,
    dequantize_fp8,
    int4_codes,
    quantize_affine,
    quantize_fp8,
    quantize_int4,
    restore,
    store,
    unpack_bits,
)
from exo_kimi.checkpoint.quantization import QuantSpec
from exo_kimi.checkpoint.safetensors_io import TensorEntry, read_header
from exo_kimi.checkpoint.shards import INDEX_NAME
from exo_kimi.checkpoint.sources import ModuleSource
from exo_kimi.checkpoint.text_files import CONFIG_NAME, read_text
from exo_kimi.compress.convert import float_modes
from exo_kimi.compress.convert.encoding import pack_rows
from exo_kimi.compress.convert.rows import SourceRows
from exo_kimi.compress.convert.targets import ModuleTarget
from exo_kimi.compress.convert.texts import card_text
from exo_kimi.compress.output.job import OutputJob, files_to_copy
from exo_kimi.compress.output.shard_file import Progress
from exo_kimi.compress.output.shards import OutputShard, OutputTensor
from exo_kimi.compress.output.writer import CheckpointWriter, Written
from exo_kimi.compress.ranges import RangeReader
from exo_kimi.errors import UsageError

_ARITHMETIC = 1  # of what is written; another version is another output
_SIXTEEN_BITS = ("BF16", "F16")
_Stored = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedModule:
    """What became of one module.

    Args:
        path: of the module.
        error: |stored - exact| / |exact|, of what the layout can hold.
        change: |exact - source| / |source|, of what the adapter does.
    """

    path: str
    error: float
    change: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """A checkpoint with an adapter in it, before a byte is written.

    Args:
        checkpoint: the source.
        adapter: it.
        sources: of the adapted modules, by path.
        job: what is written.
        places: of each tensor in the source.
    """

    checkpoint: Checkpoint
    adapter: AdapterManifest
    sources: Mapping[str, ModuleSource]
    job: OutputJob
    places: Mapping[str, TensorEntry]


def plan_fusion(checkpoint: Checkpoint, adapter_directory: Path, output: Path) -> Fusion:
    """Plan from headers alone.

    Raises:
        CheckpointError: the source or the adapter cannot be read, or they are not for each other.
        UsageError: the output is the source, or a module's layout cannot be written.
    """
    if output.resolve() == checkpoint.directory.resolve():
        raise UsageError("the output is the source", where=output, fix="give another directory")
    adapter, manifest = resolve_adapter(adapter_directory, checkpoint), checkpoint.manifest()
    manifest.check_here()
    wanted = {module.spec.path for module in adapter.modules}
    sources = {source.spec.path: source for source in manifest.sources if source.spec.path in wanted}
    for source in sources.values():
        if source.layout == "int4" and source.quant is not None and source.quant.bits != 4:
            raise UsageError(
                f"{source.spec.path}: integers of {source.quant.bits} bits of compressed-tensors are read, not written",
                where=checkpoint.directory,
                fix="convert the source to MLX's layout first (`exo-kimi convert DIR OUT --recipe RECIPE`)",
            )
    name, fingerprint = checkpoint.directory.resolve().name, stage_fingerprint(manifest)
    facts = [
        f"Source: {name}, fingerprint {fingerprint[:16]}",
        f"Adapter: {adapter.config.fine_tune_type} of {len(adapter.modules)} modules, fingerprint {adapter.fingerprint[:16]}",
        "Routed experts, routers and biases: byte for byte the source's",
    ]
    texts = {
        CONFIG_NAME: read_text(checkpoint.directory / CONFIG_NAME),
        "README.md": card_text(f"{name} with {adapter_directory.resolve().name}", facts),
    }
    index = checkpoint.directory / INDEX_NAME
    if index.exists():
        texts[INDEX_NAME] = read_text(index)
    places = {entry.name: entry for entry in checkpoint.index.tensors.values()}
    job = OutputJob(
        directory=output,
        kind="fuse",
        meaning={
            "source": {"name": name, "fingerprint": fingerprint},
            "adapter": {"name": adapter_directory.resolve().name, "fingerprint": adapter.fingerprint},
            "arithmetic": _ARITHMETIC,
        },
        shards=tuple(_shards(checkpoint.directory, places)),
        texts=texts,
        copied=files_to_copy(checkpoint.directory),
    )
    return Fusion(checkpoint=checkpoint, adapter=adapter, sources=sources, job=job, places=places)


def fuse(fusion: Fusion, progress: Progress | None = None) -> tuple[Written, tuple[FusedModule, ...]]:
    """Write the output, or what an interrupted run left of it; the modules are those of the files written now.

    Raises:
        UsageError, MachineError: as `CheckpointWriter`.
        CheckpointError: the source or the adapter cannot be read, or holds what is not finite.
    """
    arrays, done = fusion.adapter.read(), list[FusedModule]()
    owners = {
        entry.name: path
        for path, source in fusion.sources.items()
        for part, entries in source.parts.items()
        for entry in entries
        if part not in ("bias", "weight_shape")
    }
    made: dict[str, Mapping[str, NDArray[Any]]] = {}
    with CheckpointWriter(fusion.job, progress) as writer, RangeReader(fusion.checkpoint.directory) as reader:
        for shard in writer.missing():
            with writer.open(shard) as file:
                for tensor in shard.tensors:
                    path = owners.get(tensor.name)
                    if path is None:
                        for at, data in reader.pieces(fusion.places[tensor.name]):
                            file.put(tensor.name, data, at=at)
                        continue
                    if path not in made:
                        made[path], told = _fused(fusion.sources[path], arrays[path], reader)
                        done.append(told)
                    file.put(tensor.name, made[path][tensor.name])
            made.clear()
        return writer.finish(), tuple(done)


def _shards(directory: Path, places: Mapping[str, TensorEntry]) -> Iterator[OutputShard]:
    """The source's files as they are, tensors in the order of their bytes."""
    by_file: dict[str, list[TensorEntry]] = {}
    for entry in places.values():
        by_file.setdefault(entry.file, []).append(entry)
    for file in sorted(by_file):
        entries = sorted(by_file[file], key=lambda entry: entry.start)
        header, _, problems = read_header(directory / file)
        if problems:
            raise problems[0]
        metadata = json.loads(header).get("__metadata__") or {"format": "mlx"}
        yield OutputShard(file, tuple(OutputTensor(e.name, e.dtype, e.shape) for e in entries), metadata)


def _fused(source: ModuleSource, own: LowRank, reader: RangeReader) -> tuple[dict[str, NDArray[Any]], FusedModule]:
    """The bytes of a module's tensors by name, and what became of it."""
    rows = SourceRows(reader, source)
    before = rows.floats(0, 0, rows.out)
    exact = own.fused(before)
    stored, values = _encoded(source, exact, rows)
    length = float(np.linalg.norm(exact)) or 1.0
    told = FusedModule(
        path=source.spec.path,
        error=float(np.linalg.norm(values - exact)) / length,
        change=float(np.linalg.norm(exact - before)) / (float(np.linalg.norm(before)) or 1.0),
    )
    return {source.parts[part][0].name: data for part, data in stored.items()}, told


def _encoded(source: ModuleSource, exact: Floats, rows: SourceRows) -> tuple[_Stored, Floats]:
    """What is stored of exact weights, by the source's parts, and what a reader makes of it."""
    if source.layout == "plain":
        tensor = store(exact, source.parts["weight"][0].dtype)
        return {"weight": tensor.data}, restore(tensor)
    if source.layout == "fp8":
        codes, block_scales = quantize_fp8(exact)
        blocks = store(block_scales, source.parts["weight_scale_inv"][0].dtype)
        return {"weight": codes, "weight_scale_inv": blocks.data}, dequantize_fp8(codes, restore(blocks))
    if source.layout == "int4":
        dtype, quant = source.parts["weight_scale"][0].dtype, rows.quant
        words, kept = quantize_int4(exact, dtype=dtype)
        whole, _ = int4_codes(exact, dtype=dtype, symmetric=False)
        values = whole.reshape(len(exact), -1, quant.group_size).astype(np.float32) * restore(kept)[..., None]
        return {"weight_packed": words, "weight_scale": kept.data}, values.reshape(exact.shape)
    return _packed(source, exact, rows.quant)


def _packed(source: ModuleSource, exact: Floats, quant: QuantSpec) -> tuple[_Stored, Floats]:
    """The same of MLX's packing."""
    bits, group = quant.bits, quant.group_size
    if quant.mode != "affine":
        made = pack_rows(exact, ModuleTarget(source.spec, source, quant, "BF16", ""), "search")
        columns = unpack_bits(made.words, bits).reshape(-1, group).T
        values = float_modes.decode(columns, made.scales.reshape(-1), quant.mode).T.reshape(exact.shape)
        return {"weight": made.words, "scales": made.scales}, values
    dtype = source.parts["scales"][0].dtype
    if dtype not in _SIXTEEN_BITS:
        words, scales, biases = quantize_affine(exact, bits=bits, group_size=group, dtype=dtype)
        values = dequantize_affine(words, restore(scales), restore(biases), bits=bits, group_size=group)
        return {"weight": words, "scales": scales.data, "biases": biases.data}, values
    found = pack_rows(exact, ModuleTarget(source.spec, source, quant, dtype, ""), "search")
    parts: _Stored = {"weight": found.words, "scales": found.scales, "biases": found.biases}
    steps, lowest = (np.asarray(parts[part], np.float32) for part in ("scales", "biases"))
    return parts, dequantize_affine(found.words, steps, lowest, bits=bits, group_size=group)
