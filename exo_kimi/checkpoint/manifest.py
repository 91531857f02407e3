"""Manifest of a stage: where every module of a layer range lies on disk, checked, or every problem at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.modules import ModuleSpec, absorbed_modules, check_range, stage_modules
from exo_kimi.checkpoint.fitting import Fitting, mixed_floats
from exo_kimi.checkpoint.formats import format_declared
from exo_kimi.checkpoint.gathering import left_over, missing_module
from exo_kimi.checkpoint.hints import read_hints
from exo_kimi.checkpoint.index import CheckpointIndex, TensorEntry
from exo_kimi.checkpoint.keys import TensorKey, layer_of, parse_key
from exo_kimi.checkpoint.sources import ModuleSource
from exo_kimi.errors import (
    CheckpointError,
    CheckpointProblems,
    DtypeError,
    MissingTensorError,
    QuantizationError,
    ShapeMismatchError,
    UnexpectedTensorError,
)

__all__ = ["ModuleSource", "StageManifest", "resolve"]

_UNREAD = (DtypeError, QuantizationError, ShapeMismatchError, UnexpectedTensorError)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageManifest:
    """The modules of a half-open layer range and where they lie.

    Args:
        directory: the checkpoint.
        config: its architecture.
        start_layer: first layer.
        end_layer: one past the last layer.
        sources: the modules, in the order of the model.
        notes: findings that are not wrong: corrected hints, skipped tensors.
        fingerprint: that of the index; equal for the same files on two machines.
        corrections: paths whose hint in config.json the shapes refute, by the words that say how.
    """

    directory: Path
    config: KimiConfig
    start_layer: int
    end_layer: int
    sources: tuple[ModuleSource, ...]
    notes: tuple[str, ...]
    fingerprint: str
    corrections: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def disk_bytes(self) -> int:
        """Bytes of the range's tensors on disk."""
        return sum(source.disk_bytes for source in self.sources)

    @property
    def resident_bytes(self) -> int:
        """Bytes that MLX holds after loading them as stored."""
        return sum(source.resident_bytes for source in self.sources)

    @property
    def widened_bytes(self) -> int:
        """Bytes that a serving stage needs on top; see `ModuleSource.widened_bytes`."""
        return sum(source.widened_bytes for source in self.sources)

    def check_here(self) -> None:
        """Refuse to load what a share tells of and does not hold.

        Raises:
            MissingTensorError: with the range and what is not here of it.
        """
        absent = [
            entry
            for source in self.sources
            for entries in source.parts.values()
            for entry in entries
            if not entry.is_here
        ]
        if absent:
            raise not_here(self.directory, absent)


def not_here(directory: Path, absent: Sequence[TensorEntry]) -> MissingTensorError:
    """The error about tensors that a share tells of and does not hold."""
    layers = sorted({layer for layer in (layer_of(entry.name) for entry in absent) if layer is not None})
    first = f"{absent[0].name}" + (f" and {len(absent) - 1:,} more" if len(absent) > 1 else "")
    return MissingTensorError(
        f"{directory.name} is a share of its model, without "
        + (f"layers {layers[0]}:{layers[-1] + 1}" if layers else "these tensors"),
        expected=first,
        found="their names and shapes alone",
        where=directory,
        fix="fetch them too with `exo-kimi pull ... --layers START:END -o DIR`, or run these layers where they are",
    )


def resolve(index: CheckpointIndex, start_layer: int = 0, end_layer: int | None = None) -> StageManifest:
    """Match the modules of a layer range with the tensors on disk.

    Args:
        index: the checkpoint.
        start_layer: first layer.
        end_layer: one past the last layer; None for all.

    Raises:
        CheckpointProblems: everything that is wrong with the range, and every tensor of the checkpoint that nothing
            consumes.
        SplitError: the range is empty or outside the model.
    """
    manifest, problems = examine(index, start_layer, end_layer)
    if problems:
        raise CheckpointProblems(problems, where=index.directory)
    return manifest


def examine(
    index: CheckpointIndex, start_layer: int = 0, end_layer: int | None = None
) -> tuple[StageManifest, list[CheckpointError]]:
    """Resolve as `resolve` does, and return the problems beside the modules that have none.

    Raises:
        SplitError: the range is empty or outside the model.
    """
    config = index.config
    end = config.num_hidden_layers if end_layer is None else end_layer
    if index.foreign is not None:
        files = [problem.error for problem in index.problems]
        return _nothing(index, start_layer, end), [index.foreign, *files]
    specs = [spec for spec in stage_modules(config, start_layer, end) for spec in _as_stored(index, spec)]
    wanted = {spec.path for spec in specs}
    problems: list[CheckpointError] = []
    damaged: set[str] = set()
    whole = end - start_layer == config.num_hidden_layers
    names_unknown = False
    for problem in index.problems:
        touched = _paths(problem.names)
        if whole or touched is None or touched & wanted:
            problems.append(problem.error)
        damaged |= touched or set()
        names_unknown = names_unknown or touched is None
    problems += index.unexpected
    problems += _without_module(index)
    problems += mixed_floats(index.modules.values())
    hints = read_hints(index.raw_config)
    has_shapes = any("weight_shape" in parts for parts in index.modules.values())
    fitting = Fitting(config, hints, optional=frozenset() if has_shapes else frozenset({"weight_shape"}))
    sources = []
    for spec in specs:
        parts = index.modules.get(spec.path)
        found = len(fitting.problems)
        source = None
        if parts:
            source = fitting.fit(spec, parts)
        else:
            fitting.problems.append(missing_module(config, spec))
        if source is not None:
            sources.append(source)
        if spec.path in damaged or names_unknown:
            # What is missing lies in the damaged file, which is reported already.
            kept = [p for p in fitting.problems[found:] if not isinstance(p, MissingTensorError)]
            fitting.problems[found:] = kept
    manifest = StageManifest(
        directory=index.directory,
        config=config,
        start_layer=start_layer,
        end_layer=end,
        sources=tuple(sources),
        notes=(*index.notes, *hints.notes, *_corrections(fitting), *_skipped(index)),
        fingerprint=index.fingerprint,
        corrections={words: tuple(paths) for words, paths in fitting.corrections.items()},
    )
    return manifest, _named(index, problems + fitting.problems)


def _nothing(index: CheckpointIndex, start_layer: int, end_layer: int) -> StageManifest:
    """A manifest in which nothing could be resolved.

    Raises:
        SplitError: the range is empty or outside the model.
    """
    check_range(index.config, start_layer, end_layer)
    return StageManifest(
        directory=index.directory,
        config=index.config,
        start_layer=start_layer,
        end_layer=end_layer,
        sources=(),
        notes=index.notes,
        fingerprint=index.fingerprint,
    )


def _named(index: CheckpointIndex, problems: list[CheckpointError]) -> list[CheckpointError]:
    """The problems, or where most modules have one and config.json or a file names a foreign format, that one finding."""
    files = [problem.error for problem in index.problems]
    unread = [problem for problem in problems if isinstance(problem, _UNREAD)]
    if len(unread) <= index.config.num_hidden_layers:
        return problems
    foreign = format_declared(index.directory, index.raw_config)
    return problems if foreign is None else [foreign, *files]


def _as_stored(index: CheckpointIndex, spec: ModuleSpec) -> tuple[ModuleSpec, ...]:
    """The module itself; for kv_b_proj, embed_q and unembed_out where the checkpoint has those in its place."""
    if spec.layer is None or not spec.path.endswith(".kv_b_proj") or spec.path in index.modules:
        return (spec,)
    absorbed = absorbed_modules(index.config, spec.layer)
    return absorbed if any(half.path in index.modules for half in absorbed) else (spec,)


def _without_module(index: CheckpointIndex) -> list[CheckpointError]:
    """Tensors with a known name that this architecture has no module for."""
    config = index.config
    known = set()
    for spec in stage_modules(config, 0, config.num_hidden_layers):
        known |= {stored.path for stored in _as_stored(index, spec)}
    return [
        left_over(next(iter(holders.values())), "config.json describes no such module", len(holders))
        for path, parts in index.modules.items()
        if path not in known
        for holders in parts.values()
    ]


def _paths(names: frozenset[str] | None) -> set[str] | None:
    if names is None:
        return None
    return {key.path for key in map(parse_key, names) if isinstance(key, TensorKey)}


def _corrections(fitting: Fitting) -> list[str]:
    notes = []
    for words, paths in fitting.corrections.items():
        where = paths[0] if len(paths) == 1 else f"{len(paths)} modules, {paths[0]} first"
        notes.append(f"{where}: {words}; the shapes are followed")
    return notes


def _skipped(index: CheckpointIndex) -> list[str]:
    """What no part of a server reads; of a tower that config.json describes, `checkpoint.vision.tower_findings` tells."""
    seeing = index.raw_config.get("vision_config") is not None
    return [
        f"{count:,} tensor{'' if count == 1 else 's'} skipped: {reason}"
        for reason, count in sorted(index.skipped.items())
        if not (seeing and reason.startswith("vision "))
    ]
