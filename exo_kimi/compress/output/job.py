"""Everything that determines an output directory, before a byte of it is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exo_kimi.checkpoint.shards import INDEX_NAME
from exo_kimi.checkpoint.text_files import CONFIG_NAME
from exo_kimi.compress.output.shards import OutputShard

MANIFEST_NAME = "exo-kimi-manifest.json"
"""In a finished output: what made it, and the size and SHA-256 of every file."""

JOURNAL_NAME = "exo-kimi-unfinished.json"
"""In an unfinished one: the same of the files that are done."""

# Weights in any format, and what is made anew.
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz", ".part")
_WRITTEN_ANEW = (CONFIG_NAME, INDEX_NAME, MANIFEST_NAME, JOURNAL_NAME, "README.md")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputJob:
    """An output directory to be written: two runs of the same job write the same bytes.

    Args:
        directory: new, empty, or of an interrupted run of this job.
        kind: what makes it: `convert`, `prune`.
        meaning: JSON-like; whatever determines the bytes beside the shards and texts: the source's fingerprint, the recipe's
            hash, options, and a version that changes when the arithmetic does. Never a path or a time: it is written into
            the manifest, for people too.
        shards: the weight files.
        texts: other files by name, whole: config.json, the index, README.md.
        copied: files of the source that are copied under their own names.
        links: weight files that are linked and not written, by name.
    """

    directory: Path
    kind: str
    meaning: Mapping[str, Any]
    shards: tuple[OutputShard, ...]
    texts: Mapping[str, str]
    copied: tuple[Path, ...] = ()
    links: Mapping[str, Path] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """Of everything but the directory; an output that was begun with another is not continued."""
        digest = hashlib.sha256(json.dumps([self.kind, self.meaning, dict(self.texts)], sort_keys=True).encode())
        for shard in self.shards:
            digest.update(f"\n{shard.file}\n".encode() + shard.header)
        for name in sorted([*(path.name for path in self.copied), *self.links]):
            digest.update(f"\n{name}".encode())
        return f"sha256:{digest.hexdigest()}"

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors to write."""
        return sum(shard.tensor_bytes for shard in self.shards)


def files_to_copy(source: Path) -> tuple[Path, ...]:
    """The files beside the weights of a checkpoint: tokenizer, templates, code, licence; not config, index, card or weights."""
    return tuple(_files_to_copy(source))


def _files_to_copy(source: Path) -> Iterator[Path]:
    for path in sorted(source.iterdir()):
        hidden = path.name.startswith(".")
        if path.is_file() and not hidden and path.suffix not in _NOT_COPIED and path.name not in _WRITTEN_ANEW:
            yield path
