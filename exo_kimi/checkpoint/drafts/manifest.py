"""A draft head's directory: where its tensors lie, all of them checked, or every problem at once.

Files name the same tensors in several ways: with a `model.` in front or without, the layer as `midlayer` or `layers.0`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exo_kimi.arch.draft_config import DraftConfig
from exo_kimi.arch.draft_modules import DraftParts, draft_modules
from exo_kimi.checkpoint.drafts.vocabulary import check_vocabulary, read_integers
from exo_kimi.checkpoint.fitting import Fitting, mixed_floats
from exo_kimi.checkpoint.gathering import COPY_FIX, left_over, missing_module
from exo_kimi.checkpoint.hints import read_hints
from exo_kimi.checkpoint.index import TensorEntry, read_shards
from exo_kimi.checkpoint.shards import find_shards
from exo_kimi.checkpoint.sources import ModuleSource
from exo_kimi.checkpoint.text_files import CONFIG_NAME, read_config
from exo_kimi.errors import (
    CheckpointError,
    CheckpointProblems,
    DtypeError,
    MissingTensorError,
    ShapeMismatchError,
    UnexpectedTensorError,
)

D2T, T2D = "d2t", "t2d"
_PREFIX = re.compile(r"^(?:model\.)+")
_LAYER = re.compile(r"^(?:midlayer|layers\.\d+)\.")
_NOT_NEEDED = re.compile(r"(?:^|\.)rotary_emb\.inv_freq$")
_INTEGERS = ("I64", "I32")
_Modules = dict[str, dict[str, dict[int | None, TensorEntry]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftManifest:
    """The modules of a head and where they lie.

    Args:
        directory: of the head.
        raw_config: config.json as it is.
        config: what it says.
        sources: the modules that the head has, in the order of a pass.
        d2t: the differences that make ids of the target of ids of the head; None where both are the same.
        t2d: which ids of the target it drafts, where the head says so too.
        notes: findings that are not wrong.
        fingerprint: equal for the same files on two machines.
    """

    directory: Path
    raw_config: Mapping[str, Any]
    config: DraftConfig
    sources: tuple[ModuleSource, ...]
    d2t: TensorEntry | None
    notes: tuple[str, ...]
    fingerprint: str
    t2d: TensorEntry | None = None

    @property
    def maps(self) -> Mapping[str, TensorEntry]:
        """The tensors of its vocabulary that it has, by name."""
        return {name: entry for name, entry in ((D2T, self.d2t), (T2D, self.t2d)) if entry is not None}

    @property
    def parts(self) -> DraftParts:
        """What the head has of its own."""
        sources = {source.spec.path: source for source in self.sources}
        return DraftParts(
            embeds="embed_tokens" in sources,
            heads="lm_head" in sources,
            maps=self.d2t is not None,
            fc_bias="fc" in sources and "bias" in sources["fc"].parts,
        )

    @property
    def disk_bytes(self) -> int:
        """Bytes of its tensors on disk."""
        return sum(source.disk_bytes for source in self.sources) + (0 if self.d2t is None else self.d2t.nbytes)

    @property
    def resident_bytes(self) -> int:
        """Bytes that MLX holds after loading them as stored: ids are of 4 bytes then. What is the target's is not counted."""
        ids = 0 if self.d2t is None else 4 * self.config.draft_vocab_size
        return sum(source.resident_bytes for source in self.sources) + ids


def resolve_draft(directory: str | Path) -> DraftManifest:
    """Read a head's config.json and headers, and match its modules with its tensors.

    Raises:
        NotACheckpointError: no directory, no config.json or no weights.
        UnsupportedModelError, ConfigError: config.json is not one of a head that is known.
        UnsafeFormatError: the weights are pickled.
        CheckpointProblems: everything else that is wrong.
    """
    manifest, problems = examine_draft(directory)
    if problems:
        raise problems[0] if len(problems) == 1 else CheckpointProblems(problems, where=directory)
    return manifest


def examine_draft(directory: str | Path) -> tuple[DraftManifest, list[CheckpointError]]:
    """The same, with the problems beside the modules that have none.

    Raises:
        NotACheckpointError, UnsupportedModelError, ConfigError, CheckpointProblems, UnsafeFormatError, TensorFileError: it cannot
            be looked at.
    """
    root = Path(directory)
    raw = read_config(root)
    config = DraftConfig.from_dict(raw, where=root / CONFIG_NAME)
    found = read_shards(find_shards(root))
    problems: list[CheckpointError] = [problem.error for problem in found.problems]
    modules, maps, notes = _sorted(found.tensors, problems)
    specs = {spec.path: spec for spec in draft_modules(config, fc_bias="bias" in modules.get("fc", {}))}
    problems += [
        left_over(next(iter(holders.values())), "config.json describes no such module", len(holders))
        for path, parts in modules.items()
        if path not in specs
        for holders in parts.values()
    ]
    problems += mixed_floats(modules.values())
    hints = read_hints(raw)
    fitting = Fitting(config, hints)
    sources = []
    for path, spec in specs.items():
        if path in modules:
            source = fitting.fit(spec, modules[path])
            sources += [] if source is None else [source]
        elif not _borrowed(config, path):
            fitting.problems.append(missing_module(config, spec))
    for words, paths in fitting.corrections.items():
        where = paths[0] if len(paths) == 1 else f"{len(paths)} modules, {paths[0]} first"
        notes.append(f"{where}: {words}; the shapes are followed")
    problems += fitting.problems
    d2t = _check_maps(root, config, maps, problems)
    digest = hashlib.sha256(repr(config).encode())
    for header in found.headers:
        digest.update(header)
    manifest = DraftManifest(
        directory=root,
        raw_config=raw,
        config=config,
        sources=tuple(sources),
        d2t=d2t,
        t2d=None if d2t is None else maps.get(T2D),
        notes=(*found.notes, *hints.notes, *notes),
        fingerprint=digest.hexdigest(),
    )
    return manifest, problems


def canonical_draft_name(name: str) -> str:
    """A tensor's name as `arch.draft_modules` writes it: `model.midlayer.mlp.up_proj.weight` is `layers.0.mlp.up_proj.weight`."""
    return _LAYER.sub("layers.0.", _PREFIX.sub("", name))


def _sorted(
    tensors: Mapping[str, TensorEntry], problems: list[CheckpointError]
) -> tuple[_Modules, dict[str, TensorEntry], list[str]]:
    """Tensors by module and part; those of the vocabulary by name; and what there is to be said."""
    modules: _Modules = {}
    maps: dict[str, TensorEntry] = {}
    skipped = 0
    for name, entry in tensors.items():
        path, _, part = canonical_draft_name(name).rpartition(".")
        if not path and part in (D2T, T2D):
            holder: dict[Any, TensorEntry] = maps
            key: Any = part
        elif _NOT_NEEDED.search(name):
            skipped += 1
            continue
        else:
            holder, key = modules.setdefault(path, {}).setdefault(part, {}), None
        if key in holder:
            problems.append(left_over(entry, f"{holder[key].name} is the same weight under another name"))
        else:
            holder[key] = entry
    notes = [f"{skipped} tensors skipped: rotary frequencies, which config.json gives"] if skipped else []
    return modules, maps, notes


def _borrowed(config: DraftConfig, path: str) -> bool:
    """Whether the target's module can stand in for one that the head does not have."""
    if config.hidden_size != config.target_hidden_size:
        return False
    return path == "embed_tokens" or (path == "lm_head" and config.draft_vocab_size == config.vocab_size)


def _check_maps(
    root: Path, config: DraftConfig, maps: Mapping[str, TensorEntry], problems: list[CheckpointError]
) -> TensorEntry | None:
    """The differences, if the head has them and they are right; problems are appended."""
    entry, before = maps.get(D2T), len(problems)
    if entry is None:
        if config.draft_vocab_size < config.vocab_size:
            problems.append(
                MissingTensorError(
                    "d2t is missing: nothing says which tokens of the target the head drafts",
                    expected=f"({config.draft_vocab_size},) I64, as draft_vocab_size is less than vocab_size",
                    where=root,
                    fix=COPY_FIX,
                )
            )
        elif T2D in maps:
            problems.append(UnexpectedTensorError("t2d without d2t", where=maps[T2D].file, fix=COPY_FIX))
        return None
    truth = maps.get(T2D)
    for each, size, dtypes in (
        (entry, config.draft_vocab_size, _INTEGERS),
        (truth, config.vocab_size, ("BOOL", "U8", *_INTEGERS)),
    ):
        if each is None:
            continue
        if each.shape != (size,):
            problems.append(
                ShapeMismatchError(
                    each.name, expected=f"({size},)", found=each.describe(), where=each.file, fix=COPY_FIX
                )
            )
        if each.dtype not in dtypes:
            problems.append(
                DtypeError(
                    each.name, expected=" or ".join(dtypes), found=each.describe(), where=each.file, fix=COPY_FIX
                )
            )
    if len(problems) == before and entry.is_here:  # of headers alone, nothing is said about values
        chosen = None if truth is None or not truth.is_here else read_integers(root, truth)
        problems += check_vocabulary(read_integers(root, entry), chosen, vocab_size=config.vocab_size, where=entry.file)
    return entry if len(problems) == before else None
