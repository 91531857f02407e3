"""An adapter's directory against the Kimi that it is for: every tensor has a module and a shape that fits, or is refused."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.modules import ModuleSpec, stage_modules
from exo_kimi.checkpoint.adapters.config import (
    WEIGHTS_NAMES,
    AdapterConfig,
    read_adapter_config,
)
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.fingerprint import norms_fingerprint
from exo_kimi.checkpoint.keys import canonical_path
from exo_kimi.checkpoint.packing import restore
from exo_kimi.checkpoint.safetensors_io import StoredTensor, TensorEntry, read_header
from exo_kimi.checkpoint.sources import FLOATS
from exo_kimi.checkpoint.text_files import open_regular
from exo_kimi.errors import (
    CheckpointError,
    CheckpointProblems,
    ConfigError,
    DtypeError,
    ExoKimiError,
    MissingTensorError,
    NotFiniteError,
    ShapeMismatchError,
    TensorFileError,
    UnexpectedTensorError,
)

Floats = NDArray[np.float32]

_PEFT_PREFIX = "base_model.model."
_PARTS = {"lora_a": "lora_a", "lora_b": "lora_b", "m": "m"}
_PEFT_PARTS = {
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
}
_SUFFIX = re.compile(
    r"^(?P<path>.+)\.(?P<part>lora_a|lora_b|m|lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?)$"
)
_WORDS = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedModule:
    """One module's share of an adapter: W' = W + scale (A B)^T, or with DoRA each row of that brought to length m.

    Args:
        spec: the module, a linear (out, in).
        rank, scale: of its matrices.
        parts: `lora_a`, `lora_b` and with DoRA `m`.
        transposed: whether the matrices are stored as PEFT's, (r, in) and (out, r), in place of (in, r) and (r, out).
    """

    spec: ModuleSpec
    rank: int
    scale: float
    parts: Mapping[str, TensorEntry]
    transposed: bool

    @property
    def nbytes(self) -> int:
        """Of its tensors, on disk and in memory."""
        return sum(entry.nbytes for entry in self.parts.values())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LowRank:
    """What an adapter adds to a module.

    Args:
        lora_a: (in, r).
        lora_b: (r, out).
        magnitude: (out,), DoRA's m; None for LoRA.
        scale: of the product.
    """

    lora_a: Floats
    lora_b: Floats
    magnitude: Floats | None
    scale: float

    def fused(self, weight: Floats) -> Floats:
        """(out, in) with the adapter in it, of a weight (out, in), in float32."""
        changed: Floats = weight + np.float32(self.scale) * (self.lora_a @ self.lora_b).T
        if self.magnitude is not None:
            changed *= (self.magnitude / np.linalg.norm(changed, axis=1))[:, None]
        return changed


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterManifest:
    """The modules of an adapter and where they lie.

    Args:
        directory: of the adapter.
        config: what adapter_config.json says.
        modules: in the order of the model; at least one.
        fingerprint: of the files, equal on two machines.
        notes: findings that are not wrong.
    """

    directory: Path
    config: AdapterConfig
    modules: tuple[AdaptedModule, ...]
    fingerprint: str
    notes: tuple[str, ...]

    def within(self, start_layer: int, end_layer: int) -> tuple[AdaptedModule, ...]:
        """The modules of a half-open range of layers."""
        return tuple(each for each in self.modules if start_layer <= (each.spec.layer or 0) < end_layer)

    def bytes_within(self, start_layer: int, end_layer: int) -> int:
        """What a stage with these layers holds of it."""
        return sum(each.nbytes for each in self.within(start_layer, end_layer))

    def read(self, start_layer: int = 0, end_layer: int | None = None) -> dict[str, LowRank]:
        """The matrices of a half-open range of layers, by the module's path.

        Raises:
            TensorFileError: the file cannot be read, or changed since its header was.
            NotFiniteError: a number in it is NaN or infinite.
        """
        last = 1 + max(each.spec.layer or 0 for each in self.modules) if end_layer is None else end_layer
        return {each.spec.path: self._read(each) for each in self.within(start_layer, last)}

    def _read(self, module: AdaptedModule) -> LowRank:
        values = {part: _values(self.directory, entry) for part, entry in module.parts.items()}
        a, b = values["lora_a"], values["lora_b"]
        if module.transposed:
            a, b = np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
        magnitude = values.get("m")
        return LowRank(
            lora_a=a,
            lora_b=b,
            magnitude=None if magnitude is None else magnitude.reshape(-1),
            scale=module.scale,
        )


def resolve_adapter(directory: str | Path, base: Checkpoint) -> AdapterManifest:
    """Read an adapter's config and header, and match every tensor with a module of the Kimi that it is for.

    Args:
        directory: of the adapter.
        base: the checkpoint; a share of it will do where it holds the norms.

    Raises:
        NotACheckpointError: there is no adapter.
        ConfigError: adapter_config.json is not one that is known, or names another base.
        CheckpointProblems: tensors without a module, modules without a tensor, and shapes that do not fit.
        TensorFileError: the weights cannot be read.
    """
    root = Path(directory)
    config = read_adapter_config(root)
    note = _check_base(root, config, base)
    adapter = resolve_for(root, config, base.config, notes=note)
    held = {source.spec.path for source in base.manifest().sources}
    absent = [each.spec.path for each in adapter.modules if each.spec.path not in held]
    if absent:
        raise UnexpectedTensorError(
            f"the adapter is for {len(absent)} modules that this checkpoint holds in another form",
            expected="embed_q and unembed_out have no adapter: a checkpoint with kv_b_proj",
            found=", ".join(absent[:3]),
            where=root,
            fix="take a base with kv_b_proj (`exo-kimi convert --keep-kv-b`), or an adapter without it",
        )
    return adapter


def resolve_for(root: Path, config: AdapterConfig, kimi: KimiConfig, *, notes: tuple[str, ...] = ()) -> AdapterManifest:
    """The same where the base is known to be the right one.

    Raises:
        CheckpointProblems, TensorFileError: as `resolve_adapter`.
    """
    path = root / WEIGHTS_NAMES[config.format]
    header, entries, broken = read_header(path)
    if broken:
        raise CheckpointProblems(broken, where=root) if len(broken) > 1 else broken[0]
    problems: list[ExoKimiError] = []
    specs = {spec.path: spec for spec in stage_modules(kimi, 0, kimi.num_hidden_layers)}
    found: dict[str, dict[str, TensorEntry]] = {}
    for entry in entries:
        placed = _placed(entry, config, specs, where=path)
        if isinstance(placed, CheckpointError):
            problems.append(placed)
        elif placed[1] in found.setdefault(placed[0], {}):
            problems.append(UnexpectedTensorError(entry.name, found="the same weight under another name", where=path))
        else:
            found[placed[0]][placed[1]] = entry
    modules = []
    for name, spec in specs.items():
        if name in found:
            made = _fitted(spec, found[name], config, where=path)
            if isinstance(made, AdaptedModule):
                modules.append(made)
            else:
                problems += made
    if not found and not problems:
        problems.append(MissingTensorError("the adapter has no tensors", where=path))
    if problems:
        raise problems[0] if len(problems) == 1 else CheckpointProblems(problems, where=root)
    digest = hashlib.sha256(f"{config.scale} {config.alpha} {config.rslora}".encode() + header)
    digest.update(_bytes(root, TensorEntry("", "U8", (), path.name, entries[0].start, entries[-1].end)))
    return AdapterManifest(
        directory=root, config=config, modules=tuple(modules), fingerprint=digest.hexdigest(), notes=notes
    )


def check_adaptable(spec: ModuleSpec) -> str | None:
    """Why a module takes no adapter here; None where it takes one."""
    if spec.kind == "experts":
        return "routed experts take no adapter here"
    if spec.kind == "router":
        return "routers take no adapter: they choose the experts"
    if spec.kind != "linear" or spec.layer is None:
        return "only the linear projections of the layers take adapters"
    return None


def _check_base(root: Path, config: AdapterConfig, base: Checkpoint) -> tuple[str, ...]:
    if config.base_fingerprint is None:
        return ("adapter_config.json names no base: only shapes could be checked",)
    found = norms_fingerprint(base.manifest())
    if found != config.base_fingerprint:
        raise ConfigError(
            "the adapter is for another model",
            expected=f"{config.base_name or 'a checkpoint'} with fingerprint {config.base_fingerprint[:16]}",
            found=f"{base.directory.resolve().name} with fingerprint {found[:16]}",
            where=root,
            fix="give the checkpoint that it was trained on, in whatever bits",
        )
    return ()


def _placed(
    entry: TensorEntry, config: AdapterConfig, specs: Mapping[str, ModuleSpec], *, where: Path
) -> tuple[str, str] | CheckpointError:
    """The module's path and the part, of one tensor."""
    match = _SUFFIX.match(entry.name)
    parts = _PEFT_PARTS if config.format == "peft" else _PARTS
    if match is None or match["part"] not in parts:
        return UnexpectedTensorError(entry.name, expected=", ".join(parts), found="another tensor", where=where)
    name = match["path"].removeprefix(_PEFT_PREFIX) if config.format == "peft" else match["path"]
    path = canonical_path(name)
    if path not in specs:
        return UnexpectedTensorError(
            entry.name, expected="a module of this model", found=f"{path}, which it does not have", where=where
        )
    reason = check_adaptable(specs[path])
    if reason is not None:
        return UnexpectedTensorError(f"{entry.name}: {reason}", where=where)
    return path, parts[match["part"]]


def _fitted(
    spec: ModuleSpec, parts: Mapping[str, TensorEntry], config: AdapterConfig, *, where: Path
) -> AdaptedModule | list[CheckpointError]:
    out, into = spec.shape
    wanted = ("lora_a", "lora_b", "m") if config.fine_tune_type == "dora" else ("lora_a", "lora_b")
    problems: list[CheckpointError] = [
        MissingTensorError(f"{spec.path}: no {part}", found=", ".join(parts), where=where)
        for part in wanted
        if part not in parts
    ]
    problems += [
        UnexpectedTensorError(entry.name, found=f"{part} in an adapter of type {config.fine_tune_type}", where=where)
        for part, entry in parts.items()
        if part not in wanted
    ]
    problems += [
        DtypeError(entry.name, expected=" or ".join(FLOATS), found=entry.describe(), where=where)
        for entry in parts.values()
        if entry.dtype not in FLOATS
    ]
    if problems:
        return problems
    transposed = config.format == "peft"
    rank = parts["lora_a"].shape[0 if transposed else -1] if len(parts["lora_a"].shape) == 2 else config.rank
    shapes = {"lora_a": (into, rank), "lora_b": (rank, out), "m": (out,)}
    if transposed:
        shapes = {"lora_a": (rank, into), "lora_b": (out, rank), "m": (out,)}
    for part, entry in parts.items():
        if entry.shape != shapes[part]:
            problems.append(ShapeMismatchError(entry.name, expected=shapes[part], found=entry.describe(), where=where))
    if problems:
        return problems
    return AdaptedModule(spec=spec, rank=rank, scale=config.scale_of(rank), parts=dict(parts), transposed=transposed)


def _values(directory: Path, entry: TensorEntry) -> Floats:
    raw = np.frombuffer(_bytes(directory, entry), _WORDS[entry.dtype]).reshape(entry.shape)
    values = restore(StoredTensor(entry.dtype, raw))
    if not np.isfinite(values).all():
        raise NotFiniteError(f"{entry.name}: a number is not finite", where=directory / entry.file)
    return values


def _bytes(directory: Path, entry: TensorEntry) -> bytes:
    path = directory / entry.file
    try:
        with os.fdopen(open_regular(path), "rb") as stream:
            stream.seek(entry.start)
            data = stream.read(entry.nbytes)
    except OSError as error:
        raise TensorFileError(f"{entry.name or path.name} cannot be read", found=error.strerror, where=path) from error
    if len(data) != entry.nbytes:
        raise TensorFileError(
            f"{path.name} ends inside {entry.name}", expected=f"{entry.nbytes} bytes", found=len(data), where=path
        )
    return data
