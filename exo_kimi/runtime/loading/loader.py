"""A stage's tensors, from its manifest into a model, with nothing missing and nothing left over.

Peak memory is the stage's own parameters and `STAGING_BYTES` (one expert's matrix for FP8): bytes land by preadv in memory
that MLX owns, in file order, and only the stage's own byte ranges are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import ModuleSource, StageManifest, resolve
from exo_kimi.errors import MissingTensorError, ShapeMismatchError, UnexpectedTensorError, UsageError
from exo_kimi.experts.budget import ExpertCache
from exo_kimi.models.families import build
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.models.projection import LEAVES, adopt
from exo_kimi.runtime.loading.filling import Job, jobs_of, shape_checks
from exo_kimi.runtime.loading.parameter_memory import DerivedParameter, ParameterMemory, Target, can_share
from exo_kimi.runtime.loading.streaming import attach_banks, mixture_at, slot_memory, slotted_layers
from exo_kimi.runtime.loading.tensor_reader import TensorReader

Progress = Callable[[int, int], None]
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def load(
    path: str | Path,
    start_layer: int = 0,
    end_layer: int | None = None,
    dtype: str | None = None,
    *,
    fuse: bool = False,
) -> Model:
    """Load a checkpoint, or the stage of it that owns a half-open range of layers, strictly.

    Args:
        path: a checkpoint directory in any published layout.
        start_layer: the stage that starts at 0 owns the embedding.
        end_layer: None for all further layers; the stage that ends last owns the final norm and the head.
        dtype: "float32", "bfloat16" or "float16" for every floating parameter (and so for activations); None keeps what
            is stored. Packed weights stay packed, what is float32 in every checkpoint stays so.
        fuse: see `load_stage`.

    Returns:
        The model in evaluation mode. Only its own bytes were read and stay resident.

    Raises:
        CheckpointProblems: what is on disk cannot be this model; raised before any weight is read.
        TensorFileError: a file changed while it was read.
        SplitError: the range is empty or outside the model.
        UsageError: an unknown dtype.
    """
    check_dtype(dtype)
    return load_stage(resolve(open_index(Path(path)), start_layer, end_layer), dtype=dtype, fuse=fuse)


def load_stage(
    manifest: StageManifest,
    *,
    dtype: str | None = None,
    progress: Progress | None = None,
    layers_only: bool = False,
    fuse: bool = False,
    alone: bool = False,
    expert_cache: ExpertCache | None = None,
) -> Model:
    """Build the model of a manifest's layer range and fill it.

    Args:
        manifest: where every module's tensors lie and how they are packed.
        dtype: see `load`.
        progress: called with (bytes read, bytes to read) as reading goes on.
        layers_only: leave out the embedding, the final norm and the head.
        fuse: make decoding fast, see `Model.fuse_projections`: projections of one input are read into one array, without a copy.
        alone: no other thread of this process uses MLX meanwhile. Memory is then not filled before it is read into, which
            takes a third less time; beside another thread that would hang.
        expert_cache: what may be held of the routed experts; the others stay on disk until a token asks for them. None holds
            all.

    Raises:
        MissingTensorError, UnexpectedTensorError, ShapeMismatchError: the manifest does not fit the model.
        TensorFileError: a file changed since its header was read.
        UsageError: an unknown dtype, or an expert cache that is too small.
    """
    check_dtype(dtype)
    manifest.check_here()
    sources = [source for source in manifest.sources if source.spec.layer is not None or not layers_only]
    stage = slotted_layers(
        sources,
        expert_cache,
        dtype=dtype,
        chosen=manifest.config.num_experts_per_tok,
        directory=manifest.directory,
    )
    slotted = stage.layers
    model = build(manifest.config, manifest.start_layer, manifest.end_layer, layers_only=layers_only)
    for layer, each in slotted.items():
        mixture_at(model, layer).use_slots(each.slots)
    shape_modules(model, sources)
    jobs: list[Job] = []
    targets: dict[str, Target | DerivedParameter] = {}
    for each in slotted.values():
        targets |= each.targets()
    for source in sources:
        if source.spec.kind == "experts" and source.spec.layer in slotted:
            jobs += shape_checks(source)
            continue
        source_jobs, source_targets = jobs_of(source, DTYPES[dtype] if dtype else None)
        twice = targets.keys() & source_targets
        if twice:
            raise UnexpectedTensorError("a parameter has two sources", found=min(twice), where=manifest.directory)
        jobs += source_jobs
        targets |= source_targets
    check_targets(model, targets, where=manifest.directory)
    groups = _fused_groups(model, targets) if fuse else []
    shared = [members for group in groups for members in group.filled()]
    grouped = {target for members in shared for target in members}
    single = [[each] for each in targets.values() if isinstance(each, Target) and each not in grouped]
    memory = ParameterMemory([*shared, *single], alone=alone)

    views = slot_memory(slotted, targets, memory)
    total = sum(
        entry.nbytes
        for source in sources
        for part, entries in source.parts.items()
        for entry in entries
        if part == "weight_shape" or source.spec.kind != "experts" or source.spec.layer not in slotted
    )
    done = 0

    def on_read(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    with TensorReader(manifest.directory, on_read) as reader:
        for job in sorted(jobs, key=lambda job: (job.entry.file, job.entry.start)):
            job.fill(reader, memory)
        reader.wait()
    for group in groups:
        group.module.fused = adopt([group.module[name] for name in group.names], group.take(memory))
        for path in group.paths:
            del targets[path]
    for path, target in targets.items():
        module_path, _, leaf = path.rpartition(".")
        module_at(model, module_path)[leaf] = memory.take(target)
    mx.eval(model.parameters())
    if slotted and expert_cache is not None:
        attach_banks(model, stage, views, directory=manifest.directory, cache=expert_cache)
    if fuse:
        model.fuse_projections()
    model.eval()
    mx.clear_cache()
    return model


def check_dtype(dtype: str | None) -> None:
    """Refuse a dtype that parameters cannot have.

    Raises:
        UsageError: with the known ones.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError("unknown dtype", expected=", ".join(DTYPES), found=repr(dtype))


def shape_modules(model: nn.Module, sources: Sequence[ModuleSource]) -> None:
    """Give each module the form that its source has: quantized as packed, attention as on disk. Nothing is computed yet."""
    quants = {}
    for source in sources:
        if source.spec.path.endswith(".embed_q"):
            module_at(model, source.spec.path.rpartition(".")[0]).use_absorbed_modules()
        if source.quant is not None and source.spec.kind == "router":
            module_at(model, source.spec.path).use_packing(**asdict(source.quant))
        elif source.quant is not None:
            quants[source.spec.path] = source.quant

    def packing(path: str, module: nn.Module) -> dict[str, Any] | bool:
        quant = quants.get(path)
        return quant is not None and {"group_size": quant.group_size, "bits": quant.bits, "mode": quant.mode}

    nn.quantize(model, class_predicate=packing)


def check_targets(model: nn.Module, targets: dict[str, Target | DerivedParameter], *, where: Path) -> None:
    """See that every parameter is filled exactly once and by something of its shape.

    Raises:
        MissingTensorError, UnexpectedTensorError, ShapeMismatchError: with the names.
    """
    expected = {path: tuple(value.shape) for path, value in tree_flatten(model.parameters())}
    missing, extra = sorted(expected.keys() - targets), sorted(targets.keys() - expected)
    if missing:
        raise MissingTensorError(
            f"{len(missing)} parameters have no tensor", found=", ".join(missing[:10]), where=where
        )
    if extra:
        raise UnexpectedTensorError(f"{len(extra)} tensors have no parameter", found=", ".join(extra[:10]), where=where)
    for path, target in targets.items():
        if target.shape != expected[path]:
            raise ShapeMismatchError(path, expected=expected[path], found=target.shape, where=where)


@dataclass(frozen=True, slots=True)
class _FusedGroup:
    """Projections of one module that are read into one array for each leaf, `members[leaf]` in the order of `names`."""

    module: Any
    names: tuple[str, ...]
    paths: tuple[str, ...]
    members: dict[str, list[Target | DerivedParameter]]

    def filled(self) -> Iterator[list[Target]]:
        """The targets that lie in one array, for each leaf that is read and not derived."""
        for members in self.members.values():
            if targets := [each for each in members if isinstance(each, Target)]:
                yield targets

    def take(self, memory: ParameterMemory) -> dict[str, mx.array]:
        """The filled arrays, not evaluated. What is derived is so from the whole array of its sources."""
        return {leaf: memory.take(members[0]) for leaf, members in self.members.items()}


def _fused_groups(model: Model, targets: dict[str, Target | DerivedParameter]) -> list[_FusedGroup]:
    groups = []
    for path, module, names in model.groups():
        leaves = [leaf for leaf in LEAVES if f"{path}.{names[0]}.{leaf}" in targets]
        members = {leaf: [targets[f"{path}.{name}.{leaf}"] for name in names] for leaf in leaves}
        if all(can_share(parts) for parts in members.values()):
            paths = tuple(f"{path}.{name}.{leaf}" for name in names for leaf in leaves)
            groups.append(_FusedGroup(module, names, paths, members))
    return groups


def module_at(model: nn.Module, path: str) -> Any:
    """The module that a path names, numbers being places in lists."""
    module: Any = model
    for name in path.split("."):
        module = module[int(name)] if isinstance(module, list) else module[name]
    return module
