"""Weight files before they are written: every tensor's place follows from its dtype and shape alone.

tensors = [OutputTensor("model.norm.weight", "BF16", (7168,)), ...]
shards = cut_shards([[norm], [gate_weight, gate_scales, gate_biases]], shard_bytes=5 * 10**9)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from exo_kimi.checkpoint.safetensors_io import BITS_PER_ELEMENT
from exo_kimi.checkpoint.shards import INDEX_NAME

__all__ = ["INDEX_NAME", "OutputShard", "OutputTensor", "cut_shards", "index_text"]

SHARD_BYTES = 5 * 10**9
"""Largest weight file unless one module is larger: what mlx-lm and Hugging Face's libraries write."""

_ALIGNMENT = 8  # of the first tensor, as the safetensors library pads its headers


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor to write: its name, safetensors' name of its dtype, and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * BITS_PER_ELEMENT[self.dtype] // 8


@dataclass(frozen=True)
class OutputShard:
    """One weight file: its name, and its tensors in the order of their bytes.

    Args:
        file: the name, inside the output directory.
        tensors: without gap, in this order.
        metadata: the header's `__metadata__`.
    """

    file: str
    tensors: tuple[OutputTensor, ...]
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "mlx"})

    @cached_property
    def header(self) -> bytes:
        """Length and JSON, as the safetensors library spells them: compact, padded with spaces to eight bytes."""
        fields: dict[str, object] = {"__metadata__": dict(self.metadata)} if self.metadata else {}
        position = 0
        for tensor in self.tensors:
            end = position + tensor.nbytes
            fields[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [position, end],
            }
            position = end
        text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    @cached_property
    def starts(self) -> Mapping[str, int]:
        """The first byte of each tensor in the file, absolute."""
        places, position = {}, len(self.header)
        for tensor in self.tensors:
            places[tensor.name] = position
            position += tensor.nbytes
        return places

    @property
    def tensor_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + self.tensor_bytes


def cut_shards(
    groups: Iterable[Sequence[OutputTensor]],
    *,
    shard_bytes: int = SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> tuple[OutputShard, ...]:
    """Cut tensors into files of a given size, in their order.

    Args:
        groups: tensors that are made together, such as a module's weight, scales and biases: they share a file.
        shard_bytes: most bytes of a file's tensors; a group that is larger has a file of its own.
        metadata: of every header; `{"format": "mlx"}` by default.

    Returns:
        Files named as Hugging Face's libraries name them. Inside a file wider dtypes come first, so that every tensor is
        aligned to its element.
    """
    files: list[list[OutputTensor]] = [[]]
    used_bytes = 0
    for group in groups:
        size = sum(tensor.nbytes for tensor in group)
        if files[-1] and used_bytes + size > shard_bytes:
            files.append([])
            used_bytes = 0
        files[-1] += group
        used_bytes += size
    count = len(files)
    return tuple(
        OutputShard(
            "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors",
            tuple(sorted(tensors, key=lambda tensor: -BITS_PER_ELEMENT[tensor.dtype])),
            {"format": "mlx"} if metadata is None else metadata,
        )
        for number, tensors in enumerate(files, start=1)
    )


def index_text(shards: Iterable[OutputShard]) -> str:
    """`model.safetensors.index.json` for these files."""
    files = tuple(shards)
    weight_map = {tensor.name: shard.file for shard in files for tensor in shard.tensors}
    total = sum(shard.tensor_bytes for shard in files)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2, ensure_ascii=False) + "\n"
