"""A share of a checkpoint: the tensors of some layers, and of the rest the names, shapes and norms.

One machine's files after `exo-kimi pull --layers`. The headers of all files are in it, so a plan can be made and checked from
it, and the norms of all layers, by which two machines know that they have the same checkpoint; no other tensor's bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from exo_kimi.checkpoint.index import CheckpointIndex, TensorEntry
from exo_kimi.checkpoint.keys import TensorKey, layer_of, parse_key
from exo_kimi.checkpoint.manifest import StageManifest
from exo_kimi.units import format_bytes


def is_share(index: CheckpointIndex) -> bool:
    """Whether a directory tells of tensors that it does not hold."""
    return any(not entry.is_here for entry in index.tensors.values())


def share_notes(index: CheckpointIndex) -> tuple[str, ...]:
    """What is to be said of a share: its layers, and those that are here in part; nothing of a whole checkpoint."""
    if not is_share(index):
        return ()
    held, all_of = Counter[int](), Counter[int]()
    for entry in index.tensors.values():
        layer = layer_of(entry.name)
        if layer is not None and layer < index.config.num_hidden_layers and not is_norm(entry.name):
            all_of[layer] += 1
            held[layer] += entry.is_here
    whole = [layer for layer in sorted(all_of) if held[layer] == all_of[layer]]
    in_part = [layer for layer in sorted(all_of) if 0 < held[layer] < all_of[layer]]
    size = format_bytes(sum(entry.nbytes for entry in index.tensors.values() if entry.is_here))
    note = f"a share of the model, {size}: " + (f"layers {_ranges(whole)} of {len(all_of)}" if whole else "no layer")
    return (note + (f", and in part {_ranges(in_part)}" if in_part else ""),)


def share_names(index: CheckpointIndex, manifest: StageManifest, more: Iterable[TensorEntry] = ()) -> frozenset[str]:
    """Names of the tensors that a share holds: those of its layers, the norms of all, and `more`, such as the vision tower's.

    Args:
        index: of the whole checkpoint, or of its headers.
        manifest: of the layers.
        more: further tensors.
    """
    layers = {entry.name for source in manifest.sources for entries in source.parts.values() for entry in entries}
    norms = {name for name in index.tensors if is_norm(name)}
    return frozenset(layers | norms | {entry.name for entry in more})


def is_norm(name: str) -> bool:
    """Whether a tensor is a norm of a layer or the last one: some 30 KB a layer of Kimi K2."""
    key = parse_key(name)
    return isinstance(key, TensorKey) and key.path.rpartition(".")[2].endswith("norm")


def _ranges(layers: Iterable[int]) -> str:
    """`0:3, 5:7`, half-open, of layers in ascending order."""
    ranges: list[tuple[int, int]] = []
    for layer in layers:
        if ranges and ranges[-1][1] == layer:
            ranges[-1] = (ranges[-1][0], layer + 1)
        else:
            ranges.append((layer, layer + 1))
    return ", ".join(f"{start}:{end}" for start, end in ranges)
