"""Gather the tensors of one module, complete and in order, or say what is missing, left over or unlike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.draft_config import DraftConfig
from exo_kimi.arch.modules import ModuleSpec
from exo_kimi.checkpoint.safetensors_io import TensorEntry
from exo_kimi.checkpoint.sources import Parts, layout_of, required_parts, tensor_name
from exo_kimi.errors import CheckpointError, MissingTensorError, QuantizationError, UnexpectedTensorError

COPY_FIX = "download or copy the checkpoint again"
Gathered = dict[str, tuple[TensorEntry, ...]]


def gather(
    config: KimiConfig | DraftConfig, spec: ModuleSpec, parts: Parts, *, optional: Collection[str] = ()
) -> tuple[Gathered, list[CheckpointError]]:
    """Gather a module's tensors: part -> one tensor, or one per expert in the order of the experts; and every problem met.

    Args:
        config: for the names of missing tensors.
        spec: the module.
        parts: what the files hold of it.
        optional: parts that no module of the checkpoint has, and that may be wanting.
    """
    layout = layout_of(parts)
    required = tuple(part for part in required_parts(spec, layout, parts) if part not in optional)
    problems: list[CheckpointError] = [
        _left_over(spec, required, holders) for part, holders in parts.items() if part not in required
    ]
    # One part decides whether experts are stacked; the others must follow it.
    stacked = spec.kind != "experts" or None in next(iter(parts.values()))
    wanted: list[int | None] = [None] if stacked else list(range(spec.shape[0]))
    gathered: Gathered = {}
    for part in required:
        holders = parts.get(part, {})
        missing = [tensor_name(config, spec, part, expert) for expert in wanted if expert not in holders]
        if missing:
            problems.append(_missing(spec, holders, missing, len(wanted)))
            continue
        gathered[part] = tuple(holders[expert] for expert in wanted)
        if len(holders) > len(wanted):
            strays = {expert: entry for expert, entry in holders.items() if expert not in wanted}
            problems.append(_left_over(spec, ("either stacked experts or single ones",), strays))
        kinds = Counter((entry.shape, entry.dtype) for entry in gathered[part])
        if len(kinds) > 1:
            problems.append(_unlike(gathered[part], kinds))
    return gathered, problems


def missing_module(config: KimiConfig | DraftConfig, spec: ModuleSpec) -> MissingTensorError:
    """The error for a module that has no tensor at all."""
    return MissingTensorError(
        f"{tensor_name(config, spec, 'weight')} is missing",
        expected=f"{spec.kind} {spec.shape}, in any layout",
        found="no tensor of this module in any file",
        where=config.key_prefix + spec.path,
        fix=COPY_FIX,
    )


def left_over(entry: TensorEntry, why: str, count: int = 1) -> UnexpectedTensorError:
    """The error for a tensor, or several of one module and part, that nothing consumes."""
    return UnexpectedTensorError(
        f"{entry.name}: no module consumes it",
        expected=why,
        found=entry.describe() + (f" and {count - 1} more like it" if count > 1 else ""),
        where=entry.file,
        fix="if it comes from the published checkpoint, this one needs a newer exo-kimi; else remove it",
    )


def _left_over(
    spec: ModuleSpec, required: tuple[str, ...], holders: Mapping[int | None, TensorEntry]
) -> UnexpectedTensorError:
    return left_over(next(iter(holders.values())), f"{', '.join(required)} for {spec.path}", len(holders))


def _missing(
    spec: ModuleSpec, holders: Mapping[int | None, TensorEntry], names: list[str], wanted: int
) -> MissingTensorError:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return MissingTensorError(
        f"{names[0]} is missing",
        expected=f"{wanted} tensors, one per expert" if wanted > 1 else f"a part of {spec.kind} {spec.shape}",
        found=f"in no file: {', '.join(names[:3])}{more}",
        where=next((entry.file for entry in holders.values()), spec.path),
        fix=COPY_FIX,
    )


def _unlike(entries: tuple[TensorEntry, ...], kinds: Counter[tuple[tuple[int, ...], str]]) -> QuantizationError:
    (shape, dtype), count = kinds.most_common(1)[0]
    odd = next(entry for entry in entries if (entry.shape, entry.dtype) != (shape, dtype))
    return QuantizationError(
        f"{odd.name}: the experts of one layer disagree, and they are computed in one call",
        expected=f"{shape} {dtype}, as {count} of {len(entries)} experts have it",
        found=f"{odd.describe()} ({len(entries) - count} of {len(entries)} experts differ)",
        where=odd.file,
        fix=COPY_FIX,
    )
