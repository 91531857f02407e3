"""What a stage does with prefixes at the leader's word: caches that begin from others, blocks from and to its disk.

It decides nothing but whether a block on disk is what was written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from exo_kimi.checkpoint.safetensors_io import StoredTensor
from exo_kimi.runtime.stage.prefix_disk import PrefixDisk
from exo_kimi.runtime.stage.prefix_kv import Leaves, append, capacity_for, cut
from exo_kimi.runtime.steps import Blocks

_STORED: dict[mx.Dtype, tuple[str, mx.Dtype]] = {
    mx.float32: ("F32", mx.float32),
    mx.float16: ("F16", mx.float16),
    mx.bfloat16: ("BF16", mx.uint16),  # numpy knows no bfloat16
    mx.uint32: ("U32", mx.uint32),
    mx.uint8: ("U8", mx.uint8),
}
_LOADED = {name: (words, dtype) for dtype, (name, words) in _STORED.items()}


def read_blocks(disk: PrefixDisk | None, caches: Sequence[Any], order: Blocks, *, total: int) -> int:
    """Append blocks from disk to the caches of a sequence, as far as they are good.

    Args:
        disk: of this stage.
        caches: hold `order.offset` tokens.
        order: the blocks.
        total: tokens that the caches are to hold in the end, for which memory is taken at once.

    Returns:
        Tokens that the caches hold now.
    """
    found: list[Leaves] = []
    for key in order.keys:
        block = disk.read(key) if disk is not None else None
        if block is None or not _fits(block, layers=len(caches), tokens=order.block_tokens):
            break
        found.append({name: _to_mlx(stored) for name, stored in block.items()})
    if found:
        joined = {name: mx.concatenate([block[name] for block in found], axis=3) for name in found[0]}
        append(caches, joined, capacity=capacity_for(total, caches))
    return order.offset + len(found) * order.block_tokens


def write_blocks(disk: PrefixDisk | None, caches: Sequence[Any], order: Blocks) -> None:
    """Put blocks of a sequence's caches on their way to the disk: one copy here, so that the caches may grow meanwhile."""
    for index, key in enumerate(order.keys):
        start = order.offset + index * order.block_tokens
        if disk is not None:
            leaves = cut(caches, start, start + order.block_tokens)
            disk.write(key, {name: _to_numpy(leaf) for name, leaf in leaves.items()})


def _fits(block: dict[str, StoredTensor], *, layers: int, tokens: int) -> bool:
    shapes = [stored.data.shape for stored in block.values()]
    return bool(shapes) and all(len(s) == 5 and s[0] == layers and s[1:4] == (1, 1, tokens) for s in shapes)


def _to_numpy(leaf: mx.array) -> StoredTensor:
    name, words = _STORED[leaf.dtype]
    return StoredTensor(name, np.array(leaf.view(words), copy=False))


def _to_mlx(stored: StoredTensor) -> mx.array:
    words, dtype = _LOADED[stored.dtype]
    return mx.array(stored.data).view(dtype) if words != dtype else mx.array(stored.data)
