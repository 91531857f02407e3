"""How the bytes of each published layout become the parameters of one module."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from exo_kimi.arch.modules import FLOAT32_PARAMETERS
from exo_kimi.checkpoint.index import TensorEntry
from exo_kimi.checkpoint.manifest import ModuleSource
from exo_kimi.errors import DtypeError, QuantizationError
from exo_kimi.models.sanitize import INTEGER_BIASES, dequantize_fp8
from exo_kimi.runtime.loading.parameter_memory import DerivedParameter, ParameterMemory, Target
from exo_kimi.runtime.loading.tensor_reader import TensorReader

STAGING_BYTES = 32 * 1024**2
"""Bytes converted at a time where the stored dtype is not the wanted one."""

FLOATS = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}
CODES = {"U32": mx.uint32, "I32": mx.uint32, "U8": mx.uint8}


@dataclass(frozen=True, slots=True)
class Job:
    """One tensor to read; `fill` reads it, and whatever small tensor it cannot do without, into the memory of parameters."""

    entry: TensorEntry
    fill: Callable[[TensorReader, ParameterMemory], None]


def jobs_of(source: ModuleSource, dtype: mx.Dtype | None) -> tuple[list[Job], dict[str, Target | DerivedParameter]]:
    """What to read for one module, and the parameters that it fills, by path.

    Args:
        source: the module's tensors and layout.
        dtype: of floating parameters; None keeps what is stored (bfloat16 for FP8).

    Raises:
        DtypeError: a tensor stored in a dtype that no parameter can have.
    """
    path, parts = source.spec.path, source.parts
    jobs: list[Job] = []
    targets: dict[str, Target | DerivedParameter] = {}
    rest = dict(parts)
    if source.layout == "fp8":
        jobs, targets[f"{path}.weight"] = _fp8(source, dtype or mx.bfloat16)
        rest = {"bias": parts["bias"]} if "bias" in parts else {}
    elif source.layout == "int4":
        jobs = shape_checks(source)
        rest = {"weight": parts["weight_packed"], "scales": parts["weight_scale"]}
    for leaf, entries in rest.items():
        wanted = mx.float32 if leaf in FLOAT32_PARAMETERS else dtype
        leaf_jobs, target = _as_stored(entries, wanted, shape=_shape(source, leaf, entries))
        jobs += leaf_jobs
        targets[f"{path}.{leaf}"] = target
        if source.layout == "int4" and source.quant is not None and leaf == "scales":
            derive = INTEGER_BIASES[source.quant.bits]
            targets[f"{path}.biases"] = DerivedParameter(target.shape, target.dtype, derive=derive, source=target)
    return jobs, targets


def shape_checks(source: ModuleSource) -> list[Job]:
    """What to read of a module only to compare it with the architecture."""
    return [_shape_check(source, entry) for entry in source.parts.get("weight_shape", ())]


def _as_stored(
    entries: tuple[TensorEntry, ...], dtype: mx.Dtype | None, *, shape: tuple[int, ...]
) -> tuple[list[Job], Target]:
    first = entries[0]
    is_float = first.dtype in FLOATS
    if not is_float and first.dtype not in CODES:
        raise DtypeError(first.name, expected=", ".join([*FLOATS, *CODES]), found=first.dtype, where=first.file)
    final = (dtype or FLOATS[first.dtype]) if is_float else CODES[first.dtype]
    target = Target(shape, final, parts=len(entries))
    jobs = [_copy_or_convert(entry, target, part) for part, entry in enumerate(entries)]
    return jobs, target


def _shape(source: ModuleSource, leaf: str, entries: tuple[TensorEntry, ...]) -> tuple[int, ...]:
    """Experts that lie one by one get an axis in front; a stack on disk has it already. Convolutions and decays have axes of one
    in various places."""
    spec, shape = source.spec, entries[0].shape
    if spec.kind == "conv":
        return spec.shape
    if spec.kind == "decay":
        return (1, 1, spec.shape[0], 1) if leaf == "A_log" else (math.prod(spec.shape),)
    stacked = spec.kind == "experts"
    return (len(entries), *shape) if stacked and (len(entries) > 1 or len(shape) < 3) else shape


def _copy_or_convert(entry: TensorEntry, target: Target, part: int) -> Job:
    stored = FLOATS.get(entry.dtype, target.dtype)

    def copy(reader: TensorReader, memory: ParameterMemory) -> None:
        reader.read_scattered(memory.pieces(target, part), entry)

    def convert(reader: TensorReader, memory: ParameterMemory) -> None:
        position = 0
        for piece in memory.pieces(target, part):
            elements, done = len(piece) // target.dtype.size, 0
            while done < elements:
                count = min(elements - done, STAGING_BYTES // stored.size)
                staging = np.empty(count * stored.size, np.uint8)
                reader.read_into(staging.data, entry, position)
                values = mx.array(staging).view(stored).astype(target.dtype)
                _write(values, piece[done * target.dtype.size : (done + count) * target.dtype.size])
                done += count
                position += count * stored.size

    return Job(entry, copy if stored == target.dtype else convert)


def _fp8(source: ModuleSource, dtype: mx.Dtype) -> tuple[list[Job], Target]:
    """Codes times block factors, one matrix at a time: never more than one expert unpacked beside the parameters."""
    codes, factors = source.parts["weight"], source.parts["weight_scale_inv"]
    stacked = source.spec.kind == "experts"
    matrices = source.spec.shape[0] if stacked else 1
    target = Target(_shape(source, "weight", codes), dtype, parts=matrices)
    per_entry = matrices // len(codes)

    def unpack(part: int, entry: TensorEntry, factor: TensorEntry) -> Job:
        def fill(reader: TensorReader, memory: ParameterMemory) -> None:
            scale = mx.array(np.frombuffer(reader.read(factor), np.uint8)).view(FLOATS[factor.dtype])
            scale = scale.reshape(per_entry, *factor.shape[-2:])
            size = entry.nbytes // per_entry
            for index in range(per_entry):
                code = np.empty(entry.shape[-2:], np.uint8)
                reader.read_into(code.data.cast("B"), entry, index * size)
                value = dequantize_fp8(mx.array(code), scale[index]).astype(dtype)
                _write(value, memory.pieces(target, part * per_entry + index)[0])

        return Job(entry, fill)

    jobs = [unpack(part, *pair) for part, pair in enumerate(zip(codes, factors, strict=True))]
    return jobs, target


def _shape_check(source: ModuleSource, entry: TensorEntry) -> Job:
    """compressed-tensors repeats the unpacked shape as data: it must be the architecture's."""

    def check(reader: TensorReader, memory: ParameterMemory) -> None:
        found = tuple(np.frombuffer(reader.read(entry), np.int64 if entry.dtype == "I64" else np.int32).tolist())
        if found != source.spec.shape[-2:]:
            raise QuantizationError(entry.name, expected=source.spec.shape[-2:], found=found, where=entry.file)

    return Job(entry, check)


def _write(values: mx.array, destination: memoryview) -> None:
    raw = values.reshape(-1).view(mx.uint8)
    mx.eval(raw)
    destination[:] = memoryview(raw)  # type: ignore[arg-type]
