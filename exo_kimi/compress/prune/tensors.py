"""The tensors of a pruned checkpoint: which bytes of the original each of them is. Packed bytes are copied, never made anew."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from exo_kimi.checkpoint.index import CheckpointIndex, TensorEntry
from exo_kimi.checkpoint.keys import TensorKey, layer_of, parse_fused, parse_key
from exo_kimi.checkpoint.safetensors_io import read_header
from exo_kimi.compress.output.shard_file import ShardFile
from exo_kimi.compress.output.shards import OutputShard, OutputTensor
from exo_kimi.compress.prune.plan import PrunePlan
from exo_kimi.compress.ranges import RangeReader

_LAYER = re.compile(r"(\blayers\.)(\d+)(\.)")
_EXPERT = re.compile(r"(\.experts\.)(\d+)(\.)")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptTensor:
    """A tensor that stays, whole or in part.

    Args:
        entry: it, in the original.
        name: in the pruned checkpoint.
        rows: of its first axis, those that stay, ascending; None for all.
    """

    entry: TensorEntry
    name: str
    rows: tuple[int, ...] | None

    @property
    def output(self) -> OutputTensor:
        """As it will be written."""
        shape = self.entry.shape if self.rows is None else (len(self.rows), *self.entry.shape[1:])
        return OutputTensor(self.name, self.entry.dtype, shape)

    @property
    def is_as_before(self) -> bool:
        """Whether nothing of it changes, nor its name."""
        return self.name == self.entry.name and (self.rows is None or len(self.rows) == self.entry.shape[0])

    def ranges(self) -> Iterator[tuple[int, int]]:
        """First byte and number of bytes of each run, inside the original tensor."""
        if self.rows is None:
            yield 0, self.entry.nbytes
            return
        row_bytes = self.entry.nbytes // self.entry.shape[0]
        for first, count in runs(self.rows):
            yield first * row_bytes, count * row_bytes

    def copy(self, reader: RangeReader, file: ShardFile) -> None:
        """Copy its bytes."""
        done = 0
        for first, count in self.ranges():
            for position, data in reader.pieces(self.entry, first, count):
                file.put(self.name, data, at=done + position)
            done += count


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedFile:
    """A weight file of the original and what stays of it.

    Args:
        path: of the original.
        kept: its tensors that stay, in the order of their bytes.
        is_as_before: whether that is all of it: then the file is copied as it is, header and all.
        shard: as it will be written.
    """

    path: Path
    kept: tuple[KeptTensor, ...]
    is_as_before: bool
    shard: OutputShard


def pruned_files(index: CheckpointIndex, plan: PrunePlan) -> tuple[PrunedFile, ...]:
    """What stays of each weight file; files of which nothing stays are left out."""
    by_file: dict[str, list[TensorEntry]] = {}
    for entry in sorted(index.tensors.values(), key=attrgetter("file", "start", "end")):
        by_file.setdefault(entry.file, []).append(entry)
    files = []
    for name, entries in by_file.items():
        kept = tuple(found for entry in entries if (found := kept_tensor(entry, plan)) is not None)
        if not kept:
            continue
        path = index.directory / name
        shard = OutputShard(name, tuple(tensor.output for tensor in kept), _metadata(path))
        same = len(kept) == len(entries) and all(tensor.is_as_before for tensor in kept)
        files.append(PrunedFile(path=path, kept=kept, is_as_before=same, shard=shard))
    return tuple(files)


def kept_tensor(entry: TensorEntry, plan: PrunePlan) -> KeptTensor | None:
    """What becomes of one tensor; None where it goes."""
    name = entry.name
    layer = layer_of(name)
    if plan.changes_nothing or layer is None:
        return KeptTensor(entry=entry, name=name, rows=None)
    if (
        layer in plan.dropped_layers or layer >= plan.layers
    ):  # behind the last: guesses of further tokens, with experts too
        return None
    renamed = rename_layer(name, plan)
    ids = plan.kept.get(layer)
    key, fused = parse_key(name), parse_fused(name)
    if ids is None or (fused is None and not isinstance(key, TensorKey)):
        return KeptTensor(entry=entry, name=renamed, rows=None)
    if isinstance(key, TensorKey) and key.expert is not None:
        if key.expert not in ids:
            return None
        new = _EXPERT.sub(rf"\g<1>{ids.index(key.expert)}\g<3>", renamed)
        return KeptTensor(entry=entry, name=new, rows=None)
    stacked = fused is not None or (
        isinstance(key, TensorKey) and (".switch_mlp." in key.path or key.path.endswith(".mlp.gate"))
    )
    return KeptTensor(entry=entry, name=renamed, rows=ids if stacked else None)


def guessing_entries(index: CheckpointIndex, plan: PrunePlan) -> tuple[TensorEntry, ...]:
    """The tensors behind the last layer, which guess further tokens and go: config.json has one number of experts for all."""
    if plan.changes_nothing:
        return ()
    layers = ((entry, layer_of(entry.name)) for entry in index.tensors.values())
    return tuple(entry for entry, layer in layers if layer is not None and layer >= plan.layers)


def rename_layer(name: str, plan: PrunePlan) -> str:
    """A name with its layer's new number."""
    layer = layer_of(name)
    if layer is None or not plan.dropped_layers:
        return name
    return _LAYER.sub(rf"\g<1>{plan.kept_layers().index(layer)}\g<3>", name, count=1)


def runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ascending rows as runs of neighbours: the first of each, and how many."""
    first, count = None, 0
    for row in rows:
        if first is not None and row == first + count:
            count += 1
            continue
        if first is not None:
            yield first, count
        first, count = row, 1
    if first is not None:
        yield first, count


def _metadata(path: Path) -> dict[str, str]:
    header, _, _ = read_header(path)
    return {str(key): str(value) for key, value in json.loads(header).get("__metadata__", {}).items()}
