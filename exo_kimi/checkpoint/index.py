"""Every tensor of a checkpoint directory, from the headers of its files alone.

Problems that concern single files are carried, so that a stage whose own files are sound can be loaded, and so that
`manifest.resolve` raises all findings at once.
"""

from __future__ import annotations

import gc
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exo_kimi.arch.config import KimiConfig
from exo_kimi.checkpoint.formats import format_of_tensors
from exo_kimi.checkpoint.gathering import left_over
from exo_kimi.checkpoint.keys import SkippedKey, TensorKey, is_prediction_layer, layer_of, parse_fused, parse_key
from exo_kimi.checkpoint.safetensors_io import TensorEntry, read_header
from exo_kimi.checkpoint.shards import FileProblem, Shards, disagreements, find_shards
from exo_kimi.checkpoint.text_files import read_config
from exo_kimi.errors import ForeignFormatError, UnexpectedTensorError

__all__ = ["CheckpointIndex", "FileProblem", "TensorEntry", "open_index"]


# Of peft, and of mlx-lm.
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapters.safetensors")
_MOST_PREDICTION_LAYERS = 100  # a larger number is damage, and walking over it would take forever


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointIndex:
    """Contents of a checkpoint directory.

    Args:
        directory: the directory.
        config: its architecture.
        raw_config: config.json as it is.
        tensors: every tensor, by the name in its file.
        modules: path -> part -> expert (None when stacked or not an expert) -> tensor.
        skipped: reasons -> number of tensors that a text model does not need.
        unexpected: tensors of no known meaning, as errors.
        problems: what is wrong with files.
        notes: findings that are not wrong.
        fingerprint: a hash of the architecture and of every header: equal for the same files on two machines.
        foreign: the one finding about weights of a format that is known by its tensor names and not read; their names are then
            not sorted into modules.
    """

    directory: Path
    config: KimiConfig
    raw_config: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    modules: Mapping[str, Mapping[str, Mapping[int | None, TensorEntry]]]
    skipped: Mapping[str, int]
    unexpected: tuple[UnexpectedTensorError, ...]
    problems: tuple[FileProblem, ...]
    notes: tuple[str, ...]
    fingerprint: str
    foreign: ForeignFormatError | None = None

    @property
    def disk_bytes(self) -> int:
        """Bytes of all tensors, skipped ones included."""
        return sum(entry.nbytes for entry in self.tensors.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFileTensors:
    """Tensors of the weight files by name, with the problems and notes about files, and the headers as bytes to hash."""

    tensors: Mapping[str, TensorEntry]
    problems: tuple[FileProblem, ...]
    notes: tuple[str, ...]
    headers: tuple[bytes, ...]


@dataclass(slots=True)
class _Sorting:
    """Tensors sorted into modules, skipped names and unexpected names."""

    config: KimiConfig
    prediction_layers: frozenset[int]
    modules: dict[str, dict[str, dict[int | None, TensorEntry]]] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    unexpected: list[UnexpectedTensorError] = field(default_factory=list)

    def add(self, entry: TensorEntry) -> None:
        key = parse_key(entry.name)
        layer = key.layer if isinstance(key, TensorKey) else layer_of(entry.name)
        if layer is not None and layer in self.prediction_layers:
            self.skipped["multi-token prediction layer"] += 1
        elif isinstance(key, SkippedKey):
            self.skipped[key.reason] += 1
        elif key is None:
            self._add_unknown(entry)
        elif layer is not None and layer >= self.config.num_hidden_layers:
            self.unexpected.append(
                left_over(entry, f"config.json has num_hidden_layers {self.config.num_hidden_layers}")
            )
        elif layer is not None and key.expert is not None and key.expert >= self._experts(layer):
            self.unexpected.append(left_over(entry, f"config.json has n_routed_experts {self._experts(layer)}"))
        else:
            self._put(key.path, key.part, key.expert, entry)

    def _experts(self, layer: int) -> int:
        """Of a layer; a dense one's count is not asked, since its experts are modules that the config does not describe."""
        return self.config.routed_experts(layer) or self.config.n_routed_experts

    def _put(self, path: str, part: str, expert: int | None, entry: TensorEntry) -> None:
        holders = self.modules.setdefault(path, {}).setdefault(part, {})
        if expert in holders:
            self.unexpected.append(left_over(entry, f"{holders[expert].name} is the same weight under another name"))
        else:
            holders[expert] = entry

    def _add_unknown(self, entry: TensorEntry) -> None:
        """A tensor of all experts of a layer, cut into those of each; or one of no known layout."""
        fused = parse_fused(entry.name)
        rows = 0 if fused is None or len(entry.shape) != 3 else entry.shape[1] // len(fused.paths)
        inside = fused is not None and fused.layer < self.config.num_hidden_layers
        experts = self._experts(fused.layer) if fused is not None and inside else 0
        if fused is None or not rows or not experts or entry.shape[0] != experts:
            self.unexpected.append(left_over(entry, "a name of no known layout"))
            return
        size = entry.nbytes // experts // len(fused.paths)
        for expert in range(experts):
            for half, path in enumerate(fused.paths):
                start = entry.start + (expert * len(fused.paths) + half) * size
                part = entry._replace(shape=(rows, entry.shape[2]), start=start, end=start + size)
                self._put(path, fused.part, expert, part)


def _adapters(root: Path) -> list[str]:
    """A note on LoRA adapters that lie in the directory."""
    found = [name for name in _ADAPTERS if (root / name).is_file()]
    return (
        [f"{' and '.join(found)}: a LoRA adapter, which is not applied; merge it into the weights first"]
        if found
        else []
    )


def open_index(directory: str | Path, *, raw_config: Mapping[str, Any] | None = None) -> CheckpointIndex:
    """Read config.json and every safetensors header of a directory; what reads more of it opens a `Checkpoint`.

    Args:
        directory: a checkpoint directory.
        raw_config: config.json, where it was read already.

    Raises:
        NotACheckpointError: no directory, no config.json or no weights.
        ConfigError, UnsupportedModelError, CheckpointProblems: the config is not one of a Kimi.
        UnsafeFormatError: the weights are pickled.
        TensorFileError: `model.safetensors.index.json` cannot be read.
    """
    root = Path(directory)
    raw_config = read_config(root) if raw_config is None else raw_config
    config = KimiConfig.from_dict(raw_config, where=root / "config.json")
    return sort_tensors(root, config, raw_config, read_shards(find_shards(root)))


def read_shards(shards: Shards) -> WeightFileTensors:
    """Read the headers of the weight files, whatever config.json says."""
    with _no_collecting():
        return _read_shards(shards)


@contextmanager
def _no_collecting() -> Iterator[None]:
    """Without the collector of cycles, which headers have none of: of a quarter of a million tensors it takes a third of the
    time, walking over what was read again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _read_shards(shards: Shards) -> WeightFileTensors:
    problems = list(shards.problems)
    tensors: dict[str, TensorEntry] = {}
    headers: list[bytes] = []
    for file in shards.files:
        header, entries, errors = read_header(file)
        headers.append(f"\n{file.name} {len(header)}\n".encode() + header)
        names = frozenset(entry.name for entry in entries if entry.is_here)
        promised = names if shards.promised is None else shards.promised[file.name]
        problems += [FileProblem(error, (names | promised) or None) for error in errors]
        if not errors:
            problems += disagreements(file, promised, names)
        for entry in entries:
            if entry.name in tensors:
                problems.append(_duplicate(entry, tensors[entry.name]))
            else:
                tensors[entry.name] = entry
    return WeightFileTensors(
        tensors=tensors, problems=tuple(problems), notes=tuple(shards.notes), headers=tuple(headers)
    )


def sort_tensors(
    root: Path, config: KimiConfig, raw_config: Mapping[str, Any], found: WeightFileTensors
) -> CheckpointIndex:
    """Sort the tensors of a directory into the modules of an architecture."""
    tensors = found.tensors
    digest = hashlib.sha256(repr(config).encode())
    for header in found.headers:
        digest.update(header)
    foreign = format_of_tensors(tensors, where=root)
    sorting = _Sorting(config, frozenset() if foreign else _prediction_layers(config, raw_config, tensors))
    for entry in () if foreign else tensors.values():
        sorting.add(entry)
    for parts in sorting.modules.values():
        _spell(parts)
    return CheckpointIndex(
        directory=root,
        config=config,
        raw_config=raw_config,
        tensors=tensors,
        modules=sorting.modules,
        skipped=sorting.skipped,
        unexpected=tuple(sorting.unexpected),
        problems=found.problems,
        notes=(*found.notes, *_adapters(root)),
        fingerprint=digest.hexdigest(),
        foreign=foreign,
    )


def _spell(parts: dict[str, dict[int | None, TensorEntry]]) -> None:
    """Call the parts of a module as the layouts here do, where another program means the same bytes by other names.

    compressed-tensors' `weight_scale` of FP8 blocks is `weight_scale_inv`: both multiply. Its MXFP4 is MLX's: two codes a
    byte, the lower nibble first, are eight a word, and a scale of 8 bits for each 32 is the same exponent.
    """
    scales = parts.get("weight_scale")
    if scales is None:
        return
    if _all_of(parts.get("weight"), "F8_E4M3") and "weight_scale_inv" not in parts:
        parts["weight_scale_inv"] = parts.pop("weight_scale")
    packed = parts.get("weight_packed")
    words = packed is not None and all(entry.shape and entry.shape[-1] % 4 == 0 for entry in packed.values())
    if packed is not None and words and _all_of(packed, "U8") and _all_of(scales, "U8", "F8_E8M0"):
        del parts["weight_packed"], parts["weight_scale"]
        parts["weight"] = {
            expert: entry._replace(dtype="U32", shape=(*entry.shape[:-1], entry.shape[-1] // 4))
            for expert, entry in packed.items()
        }
        parts["scales"] = {expert: entry._replace(dtype="U8") for expert, entry in scales.items()}


def _all_of(holders: Mapping[int | None, TensorEntry] | None, *dtypes: str) -> bool:
    return holders is not None and all(entry.dtype in dtypes for entry in holders.values())


def _prediction_layers(
    config: KimiConfig, raw_config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]
) -> frozenset[int]:
    """Multi-token-prediction layers after the last: declared by the config, or recognised by their own tensors.

    Any other layer after the last is unexpected: a config with too few layers must not cut the model short.
    """
    text = raw_config["text_config"] if config.key_prefix else raw_config
    declared = text.get("num_nextn_predict_layers")
    layers = config.num_hidden_layers
    found = {layer_of(name) for name in tensors if is_prediction_layer(name)}
    after = {layer for layer in found if layer is not None and layer >= layers}
    return frozenset(
        {*after, *range(layers, layers + (min(declared, _MOST_PREDICTION_LAYERS) if isinstance(declared, int) else 0))}
    )


def _duplicate(entry: TensorEntry, first: TensorEntry) -> FileProblem:
    error = UnexpectedTensorError(
        f"{entry.name} is in two files",
        expected="one file",
        found=f"{first.describe()} in {first.file}, {entry.describe()} in {entry.file}",
        where=entry.file,
        fix="remove the files of an older download",
    )
    return FileProblem(error, frozenset({entry.name}))
