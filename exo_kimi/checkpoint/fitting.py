"""Check that the tensors of a module fit the architecture, and tell how they are packed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.draft_config import DraftConfig
from exo_kimi.arch.modules import ModuleSpec
from exo_kimi.checkpoint.gathering import COPY_FIX, gather
from exo_kimi.checkpoint.hints import QuantHints
from exo_kimi.checkpoint.quantization import (
    QuantSpec,
    columns_by_bits,
    columns_in_words,
    contradiction,
    correction_in_words,
    infer_quant,
)
from exo_kimi.checkpoint.safetensors_io import TensorEntry
from exo_kimi.checkpoint.sources import FLOATS, Layout, ModuleSource, Parts, in_name, layout_of
from exo_kimi.errors import CheckpointError, DtypeError, QuantizationError, ShapeMismatchError

FP8_BLOCK = 128
WHOLE_BITS = (2, 4, 8)
_QUANT_PARTS = ("scales", "biases", "weight_scale", "weight_scale_inv")


@dataclass(slots=True)
class Fitting:
    """Check modules one by one, and collect everything that does not fit.

    Args:
        config: the architecture.
        hints: what config.json says of quantization.
        optional: parts that no module of the checkpoint has, and that may be wanting: older compressed-tensors write no shapes.

    After `fit`: `problems`, and `corrections`: what is wrong with a hint in config.json, in words, to the paths it is wrong for.
    """

    config: KimiConfig | DraftConfig
    hints: QuantHints
    optional: frozenset[str] = frozenset()
    problems: list[CheckpointError] = field(default_factory=list)
    corrections: dict[str, list[str]] = field(default_factory=dict)

    def fit(self, spec: ModuleSpec, parts: Parts) -> ModuleSource | None:
        """The source of a module, or None when a problem was found.

        Args:
            spec: the module.
            parts: what the files hold of it; at least one tensor.
        """
        layout = layout_of(parts)
        gathered, problems = gather(self.config, spec, parts, optional=self.optional)
        before = len(self.problems)
        self.problems += problems
        quant = None
        if not problems:
            single = spec.kind == "experts" and None not in next(iter(parts.values()))
            shape = spec.shape[1:] if single else spec.shape
            quant = self._fit_parts(spec, layout, shape, {part: entries[0] for part, entries in gathered.items()})
        if len(self.problems) > before:
            return None
        return ModuleSource(spec=spec, quant=quant, layout=layout, parts=gathered)

    def _fit_parts(
        self, spec: ModuleSpec, layout: Layout, shape: tuple[int, ...], parts: Mapping[str, TensorEntry]
    ) -> QuantSpec | None:
        """Check the first tensor of each part; those of the other experts are alike."""
        if spec.kind == "decay":
            self._fit_any(parts["A_log"], _spellings_of_decay(spec))
            self._fit_any(parts["dt_bias"], ((math.prod(spec.shape),), spec.shape))
            return None
        if spec.kind == "conv":
            channels, taps, _ = spec.shape
            self._fit_any(parts["weight"], (spec.shape, (channels, 1, taps), (channels, taps)))
            return None
        for part in ("bias", "e_score_correction_bias"):
            if part in parts:
                self._fits(parts[part], spec.shape[:1], FLOATS)
        if layout == "plain":
            self._fit_plain(spec, shape, parts["weight"])
            return None
        if not spec.quantizable:
            self._has_dtype(next(iter(parts.values())), FLOATS, why=f"; a {spec.kind} is never quantized")
            return None
        if layout == "fp8":
            blocks = tuple(-(-size // FP8_BLOCK) for size in shape[-2:])
            self._fits(parts["weight"], shape, ("F8_E4M3",))
            self._fits(parts["weight_scale_inv"], (*shape[:-2], *blocks), FLOATS)
            return None
        return self._fit_int4(spec, shape, parts) if layout == "int4" else self._fit_mlx(spec, shape, parts)

    def _fit_plain(self, spec: ModuleSpec, shape: tuple[int, ...], weight: TensorEntry) -> None:
        hint, own = self.hints.for_path(spec.path)
        # A default is for quantized modules only: MLX takes a module without scales as plain.
        if self._fits(weight, shape, FLOATS) and own and hint.bits:
            self._correct(spec, f"config.json says {hint.describe()}; the tensor is plain {weight.dtype}")

    def _fit_int4(self, spec: ModuleSpec, shape: tuple[int, ...], parts: Mapping[str, TensorEntry]) -> QuantSpec | None:
        packed, scale = parts["weight_packed"], parts["weight_scale"]
        fits = "weight_shape" not in parts or self._fits(parts["weight_shape"], (*shape[:-2], 2), ("I32", "I64"))
        columns, scale_columns = ((*entry.shape, 0)[-2 if entry.shape else 0] for entry in (packed, scale))
        quant = infer_quant(shape[-1], columns, scale_columns, float_mode=False)
        # Other bits leave a rest in compressed-tensors' words, and none in MLX's.
        bits = quant.bits if quant is not None and quant.bits in WHOLE_BITS else 4
        if not self._fits(packed, (*shape[:-1], shape[-1] * bits // 32), ("I32", "U32")) or not fits:
            return None
        groups = shape[-1] // (32 if quant is None else quant.group_size)
        if not self._fits(scale, (*shape[:-1], groups), FLOATS) or quant is None:
            return None
        self._compare(spec, packed, quant)
        return quant

    def _fit_mlx(self, spec: ModuleSpec, shape: tuple[int, ...], parts: Mapping[str, TensorEntry]) -> QuantSpec | None:
        weight, scales = parts["weight"], parts["scales"]
        into, width = shape[-1], in_name(self.config, spec)
        if not self._has_dtype(weight, ("U32",)) or not self._has_dtype(scales, (*FLOATS, "U8")):
            return None
        for entry in (weight, scales):
            if entry.shape[:-1] != shape[:-1] or not entry.shape:
                rows = ", ".join(map(str, shape[:-1]))
                self._mismatch(entry, f"({rows}, columns) {entry.dtype}, packed from in={into} ({width})")
                return None
        quant = infer_quant(into, weight.shape[-1], scales.shape[-1], float_mode=scales.dtype == "U8")
        if quant is None:
            self.problems.append(
                QuantizationError(
                    f"{weight.name}: its columns are no packing of {into} weights",
                    expected=f"{columns_by_bits(into)} columns for in={into} ({width}), 1 scale per 32, 64 or 128 weights",
                    found=f"{weight.describe()}, scales {scales.describe()}: "
                    + columns_in_words(into, weight.shape[-1], width=width),
                    where=weight.file,
                    fix=COPY_FIX,
                )
            )
            return None
        if "biases" in parts:
            self._fits(parts["biases"], scales.shape, (scales.dtype,))
        self._compare(spec, weight, quant)
        return quant

    def _compare(self, spec: ModuleSpec, packed: TensorEntry, quant: QuantSpec) -> None:
        hint, _ = self.hints.for_path(spec.path)
        if contradiction(hint, quant):
            self._correct(spec, correction_in_words(spec.shape[-1], packed.shape[-1], hint, quant))

    def _correct(self, spec: ModuleSpec, words: str) -> None:
        self.corrections.setdefault(words, []).append(spec.path)

    def _fit_any(self, entry: TensorEntry, shapes: Sequence[tuple[int, ...]]) -> None:
        """Shapes of one order in memory."""
        if entry.shape not in shapes:
            self._mismatch(entry, f"{' or '.join(map(str, shapes))} {' or '.join(FLOATS)}")
        else:
            self._has_dtype(entry, FLOATS)

    def _fits(self, entry: TensorEntry, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> bool:
        if entry.shape != shape:
            self._mismatch(entry, f"{shape} {' or '.join(dtypes)}")
            return False
        return self._has_dtype(entry, dtypes)

    def _has_dtype(self, entry: TensorEntry, dtypes: tuple[str, ...], *, why: str = "") -> bool:
        if entry.dtype in dtypes:
            return True
        self.problems.append(
            DtypeError(
                f"{entry.name}: stored in a dtype that its role does not allow{why}",
                expected=" or ".join(dtypes),
                found=entry.describe(),
                where=entry.file,
                fix="convert the checkpoint again from its source",
            )
        )
        return False

    def _mismatch(self, entry: TensorEntry, expected: str) -> None:
        self.problems.append(
            ShapeMismatchError(
                f"{entry.name}: its shape fits no reading of the architecture",
                expected=expected,
                found=entry.describe(),
                where=entry.file,
                fix="config.json and the weights must come from one checkpoint: copy both again",
            )
        )


def _spellings_of_decay(spec: ModuleSpec) -> tuple[tuple[int, ...], ...]:
    heads = spec.shape[0]
    if spec.a_log:
        return (spec.a_log,), (heads,)
    return (1, 1, heads, 1), (heads,), (1, heads), (heads, 1)


def mixed_floats(modules: Iterable[Parts]) -> list[DtypeError]:
    """One problem for weights, and one for scales and biases, where some are BF16 and some F16.

    Both have equal widths, so a tensor labelled with the wrong one fits every shape and reads as other numbers.
    """
    groups: dict[bool, dict[str, list[TensorEntry]]] = {}
    for parts in modules:
        for part, holders in parts.items():
            for entry in holders.values():
                if entry.dtype in ("BF16", "F16"):
                    groups.setdefault(part in _QUANT_PARTS, {}).setdefault(entry.dtype, []).append(entry)
    return [_mixed(*sorted(kinds.values(), key=len)) for kinds in groups.values() if len(kinds) > 1]


def _mixed(few: list[TensorEntry], many: list[TensorEntry]) -> DtypeError:
    return DtypeError(
        f"{few[0].name}: another 16-bit float than its like",
        expected=f"{many[0].dtype}, as {len(many):,} tensors have it",
        found=f"{few[0].describe()}" + (f" and {len(few) - 1:,} more like it" if len(few) > 1 else ""),
        where=few[0].file,
        fix="copy the file again; if it is meant, convert the checkpoint again with one float dtype",
    )
