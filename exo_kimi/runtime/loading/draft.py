"""A draft head from its directory into memory, with nothing missing and nothing left over, fitted to its target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.drafts.manifest import DraftManifest, resolve_draft
from exo_kimi.checkpoint.drafts.vocabulary import read_integers
from exo_kimi.checkpoint.manifest import ModuleSource, not_here
from exo_kimi.models.draft_head import BorrowedModules, DraftHead
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.runtime.loading.filling import Job, jobs_of
from exo_kimi.runtime.loading.loader import DTYPES, check_dtype, check_targets, module_at, shape_modules
from exo_kimi.runtime.loading.parameter_memory import DerivedParameter, ParameterMemory, Target
from exo_kimi.runtime.loading.tensor_reader import TensorReader


def load_draft_head(
    directory: str | Path, target: Checkpoint, *, model: Model | None = None, dtype: str | None = None
) -> DraftHead:
    """Load the head of a target.

    Args:
        directory: of the head.
        target: the checkpoint that it drafts for.
        model: the target, or its stage that the head stands beside: what the head has not of its own is then this model's, where
            the model holds it; else it is read from the target's files.
        dtype: see `loader.load`.

    Raises:
        CheckpointError: the head's directory cannot be read, is not complete, or is not for this target.
        TensorFileError: a file changed while it was read.
        UsageError: an unknown dtype.
    """
    check_dtype(dtype)
    manifest = resolve_draft(directory)
    manifest.config.check_target(target.config, where=manifest.directory)
    head = DraftHead(manifest.config, manifest.parts)
    _fill(head, manifest.sources, manifest.directory, dtype)
    if manifest.d2t is not None:
        head.set_draft_to_target(mx.array(read_integers(manifest.directory, manifest.d2t)))
    _borrow(head, manifest, target, model, dtype)
    head.eval()
    mx.clear_cache()
    return head


def borrowed_sources(
    manifest: DraftManifest, target: Checkpoint, *, held: Sequence[str] = ()
) -> tuple[ModuleSource, ...]:
    """Where the target's modules lie that a head needs and that its stage does not hold.

    Args:
        manifest: of the head.
        target: the checkpoint that it drafts for.
        held: `embed_tokens` and `lm_head`, as far as the stage has them.

    Raises:
        CheckpointError: the target cannot be read.
    """
    parts, layers = manifest.parts, target.config.num_hidden_layers
    found: list[ModuleSource] = []
    for name, own, first in (("embed_tokens", parts.embeds, 0), ("lm_head", parts.heads, layers - 1)):
        if not own and name not in held:
            stage = target.manifest(first, first + 1)
            found += [source for source in stage.sources if source.spec.path.rpartition(".")[2] == name]
    return tuple(found)


def _borrow(
    head: DraftHead, manifest: DraftManifest, target: Checkpoint, model: Model | None, dtype: str | None
) -> None:
    held = []
    if model is not None and model.is_first:
        head.borrow(embed_tokens=model.model.embed_tokens)
        held.append("embed_tokens")
    if model is not None and model.is_last:
        head.borrow(lm_head=model.lm_head)
        held.append("lm_head")
    sources = borrowed_sources(manifest, target, held=held)
    if not sources:
        return
    names = [source.spec.path.rpartition(".")[2] for source in sources]
    borrowed = BorrowedModules(target.config, names)
    _fill(borrowed, sources, target.directory, dtype)
    if "embed_tokens" in names:
        head.borrow(embed_tokens=borrowed.model.embed_tokens)
    if "lm_head" in names:
        head.borrow(lm_head=borrowed.lm_head)


def _fill(model: nn.Module, sources: Sequence[ModuleSource], directory: Path, dtype: str | None) -> None:
    """Give a model the form and the parameters of these sources.

    Raises:
        MissingTensorError, UnexpectedTensorError, ShapeMismatchError: they do not fit.
        TensorFileError: a file changed since its header was read.
    """
    absent = [entry for each in sources for entries in each.parts.values() for entry in entries if not entry.is_here]
    if absent:
        raise not_here(directory, absent)
    shape_modules(model, sources)
    jobs: list[Job] = []
    targets: dict[str, Target | DerivedParameter] = {}
    for source in sources:
        source_jobs, source_targets = jobs_of(source, DTYPES[dtype] if dtype else None)
        jobs += source_jobs
        targets |= source_targets
    check_targets(model, targets, where=directory)
    memory = ParameterMemory([[each] for each in targets.values() if isinstance(each, Target)])
    with TensorReader(directory) as reader:
        for job in sorted(jobs, key=lambda job: (job.entry.file, job.entry.start)):
            job.fill(reader, memory)
        reader.wait()
    for path, target in targets.items():
        module_path, _, leaf = path.rpartition(".")
        module_at(model, module_path)[leaf] = memory.take(target)
    mx.eval(model.parameters())
