"""What a draft head's directory holds: `exo-kimi inspect HEAD_DIR`."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exo_kimi.arch.draft_config import DraftConfig, draft_architecture
from exo_kimi.arch.draft_modules import draft_kv_bytes_per_token, feature_bytes_per_token
from exo_kimi.checkpoint.doctor.report import Report, inspect
from exo_kimi.checkpoint.drafts.manifest import DraftManifest, examine_draft
from exo_kimi.checkpoint.sources import ModuleSource
from exo_kimi.checkpoint.text_files import read_config
from exo_kimi.errors import CheckpointError, CheckpointProblems, ExoKimiError
from exo_kimi.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftReport:
    """Report on a head; what a problem leaves unknown is None or empty."""

    directory: Path
    manifest: DraftManifest | None
    problems: tuple[ExoKimiError, ...]

    def to_json(self) -> str:
        """One JSON document; keys are only ever added."""
        manifest = self.manifest
        found: dict[str, Any] = {"directory": str(self.directory), "ok": not self.problems, "draft_head": None}
        if manifest is not None:
            config, parts = manifest.config, manifest.parts
            found["draft_head"] = {
                "architecture": config.architecture,
                "kind": config.kind,
                "version": config.version,
                "hidden_size": config.hidden_size,
                "target_hidden_size": config.target_hidden_size,
                "vocab_size": config.vocab_size,
                "draft_vocab_size": config.draft_vocab_size,
                "layer_ids": None if config.layer_ids is None else list(config.layer_ids),
                "own_embedding": parts.embeds,
                "own_head": parts.heads,
                "disk_bytes": manifest.disk_bytes,
                "resident_bytes": manifest.resident_bytes,
                "cache_bytes_per_token": draft_kv_bytes_per_token(config),
                "feature_bytes_per_token": feature_bytes_per_token(config),
                "packing": dict(_packing(manifest)),
                "target_fingerprint": config.target_fingerprint,
                "fingerprint": manifest.fingerprint,
            }
            found["notes"] = list(manifest.notes)
        found["problems"] = [
            {
                "kind": type(problem).__name__,
                "what": problem.what,
                "expected": problem.expected,
                "found": problem.found,
                "where": problem.where,
                "fix": problem.fix,
            }
            for problem in self.problems
        ]
        return json.dumps(found, indent=2, ensure_ascii=False)

    def to_text(self) -> str:
        """For a terminal."""
        blocks = [[str(self.directory)]]
        if self.manifest is not None:
            blocks += [_lines(self.manifest), [f"note     {note}" for note in self.manifest.notes]]
        count = len(self.problems)
        blocks.append([f"{count} problem{'' if count == 1 else 's'}" if count else "no problems"])
        blocks[-1] += [f"{type(problem).__name__}: {problem}" for problem in self.problems]
        return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def is_draft(directory: str | Path) -> bool:
    """Whether a directory's config.json is one of a draft head."""
    try:
        return draft_architecture(read_config(directory)) is not None
    except CheckpointError:
        return False


def inspect_any(directory: str | Path) -> Report | DraftReport:
    """Look at a checkpoint's directory, or at a head's, without reading a weight.

    Raises:
        NotACheckpointError: there is no such directory.
    """
    return inspect_draft(directory) if is_draft(directory) else inspect(directory)


def inspect_draft(directory: str | Path) -> DraftReport:
    """Look at a head's directory; one with problems gives a report that lists all of them."""
    root = Path(directory)
    try:
        manifest, problems = examine_draft(root)
    except CheckpointProblems as error:
        return DraftReport(directory=root, manifest=None, problems=tuple(error.problems))
    except CheckpointError as error:
        return DraftReport(directory=root, manifest=None, problems=(error,))
    return DraftReport(directory=root, manifest=manifest, problems=tuple(problems))


def layers_in_words(config: DraftConfig) -> str:
    """`2, 30, 58`, or the default that a target's layers decide."""
    if config.layer_ids is None:
        return "2, L / 2 and L - 3 of its target's L layers"
    return ", ".join(map(str, config.layer_ids))


def _lines(manifest: DraftManifest) -> list[str]:
    config, parts = manifest.config, manifest.parts
    borrowed = [name for name, own in (("embedding", parts.embeds), ("output head", parts.heads)) if not own]
    of_target = f"; {' and '.join(borrowed)} of its target" if borrowed else ""
    packing = ", ".join(f"{count} {name}" for name, count in _packing(manifest))
    return [
        f"head     EAGLE-{config.version}, {config.kind.upper()} ({config.architecture}), for a target with hidden size "
        f"{config.target_hidden_size} and {config.vocab_size:,} tokens",
        f"drafts   {config.draft_vocab_size:,} of {config.vocab_size:,} tokens{of_target}",
        f"reads    what enters layers {layers_in_words(config)}: {feature_bytes_per_token(config):,} bytes a token (16-bit)",
        f"weights  {format_bytes(manifest.disk_bytes)}, {packing}",
        f"memory   {format_bytes(manifest.resident_bytes)} when loaded as stored, "
        f"{draft_kv_bytes_per_token(config):,} cache bytes a token (16-bit)",
    ]


def _packing(manifest: DraftManifest) -> list[tuple[str, int]]:
    """How modules are stored, norms apart, and how many are so; the most first."""
    return Counter(_stored(source) for source in manifest.sources if source.spec.quantizable).most_common()


def _stored(source: ModuleSource) -> str:
    if source.quant is not None:
        return source.quant.describe()
    return "fp8" if source.layout == "fp8" else next(iter(source.parts["weight"])).dtype.lower()
