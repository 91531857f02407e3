"""The bits that config.json states against those that the packed shapes show, and the entries as they should be.

Which spelling means what is in `checkpoint.hints`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from exo_kimi.checkpoint.doctor.findings import Checkup
from exo_kimi.checkpoint.hints import (
    SECTIONS,
    Hint,
    QuantHints,
    is_entry,
    matches,
    override_numbers,
    read_hints,
    section_scope,
    skip_lists,
)
from exo_kimi.checkpoint.keys import canonical_path
from exo_kimi.checkpoint.manifest import StageManifest
from exo_kimi.checkpoint.quantization import QuantSpec, contradiction
from exo_kimi.checkpoint.sources import ModuleSource
from exo_kimi.checkpoint.text_files import CONFIG_NAME
from exo_kimi.errors import QuantizationError


def check_bits(
    raw: Mapping[str, Any], manifest: StageManifest, checkup: Checkup
) -> tuple[Mapping[str, Any], list[str]]:
    """Warn of every hint that the shapes refute or that other programs would miss: exo-kimi follows the shapes.

    Returns:
        config.json with right entries, and the changes in words; as it was, and none, where nothing can be mended.
    """
    hints = read_hints(raw)
    wrong = _misread(hints, manifest.sources)
    if not wrong:
        return raw, []
    mended = _rewrite(raw, hints, manifest)
    fixable = not _misread(read_hints(mended), manifest.sources)
    told: set[str] = set()
    for words, paths in manifest.corrections.items():
        _warn(checkup, f"config.json is wrong about {_some(paths)}", words, fixable)
        told.update(paths)
    unsaid = [source.spec.path for source in wrong if source.spec.path not in told]
    if unsaid:
        said = "bits and group_size of every packed module"
        _warn(checkup, f"config.json does not say how {_some(unsaid)} are packed", said, fixable)
    return (mended, _changes(raw, mended)) if fixable else (raw, [])


def _warn(checkup: Checkup, what: str, words: str, fixable: bool) -> None:
    said, _, truth = words.partition("; ")
    checkup.warn(
        QuantizationError(
            what,
            expected=truth or said,
            found=said if truth else None,
            where=CONFIG_NAME,
            fix="exo-kimi follows the shapes; other programs would read garbage",
        ),
        fixable=fixable,
    )


def _misread(hints: QuantHints, sources: Iterable[ModuleSource]) -> list[ModuleSource]:
    """The modules that a program which believes config.json would read wrongly."""
    found = []
    for source in sources:
        hint, own = hints.for_path(source.spec.path)
        if source.layout == "mlx":
            if not _states(hint, source.quant):
                found.append(source)
        elif source.layout == "int4":
            if contradiction(hint, source.quant) or hint.bits is None or hint.group_size is None:
                found.append(source)
        elif source.layout == "plain" and own and hint.bits:
            found.append(source)
    return found


def _states(hint: Hint, quant: QuantSpec | None) -> bool:
    return quant is not None and Hint(hint.bits, hint.group_size, hint.mode or "affine") == _hint(quant)


def _hint(quant: QuantSpec) -> Hint:
    return Hint(quant.bits, quant.group_size, quant.mode)


def _rewrite(raw: Mapping[str, Any], hints: QuantHints, manifest: StageManifest) -> dict[str, Any]:
    """The config with its own sections mended; sections that are not asked stay as they are."""
    mlx = [source for source in manifest.sources if source.layout == "mlx"]
    int4 = [source.quant for source in manifest.sources if source.layout == "int4" and source.quant is not None]
    if section_scope(raw) is None and not mlx:
        return dict(raw)  # what Hugging Face writes for int4 holds more than numbers
    path, name = section_scope(raw) or ((), SECTIONS[0])
    scope = dict(raw[path[0]]) if path else dict(raw)
    section = dict(scope[name]) if isinstance(scope.get(name), Mapping) else {}
    if mlx:
        section = _for_mlx(section, hints, mlx, manifest.config.key_prefix)
    elif int4:
        section = _for_int4(section, int4[0], [source.spec.path for source in manifest.sources if source.quant])
    section = _without_entries(section, {source.spec.path for source in manifest.sources if source.layout == "plain"})
    for twin in SECTIONS:
        # MLX writes the same numbers under both names; of a config for other weights only the first is asked.
        if twin == name or (mlx and twin in scope):
            scope[twin] = section
    return {**raw, path[0]: scope} if path else scope


def _for_mlx(section: dict[str, Any], hints: QuantHints, sources: list[ModuleSource], prefix: str) -> dict[str, Any]:
    packed = {source.spec.path: source.quant for source in sources if source.quant is not None}
    counts = Counter(packed.values())
    default = next((quant for quant in counts if _states(hints.default, quant)), None)
    if default is None:
        default = counts.most_common(1)[0][0]
        section = override_numbers(section, default.bits, default.group_size, default.mode)
    fresh = read_hints({SECTIONS[0]: section})
    odd = {path: quant for path, quant in packed.items() if not _states(fresh.for_path(path)[0], quant)}
    section = _without_entries(section, odd.keys())
    for path, quant in odd.items():
        mode = {} if quant.mode == default.mode else {"mode": quant.mode}
        section[prefix + path] = {"group_size": quant.group_size, "bits": quant.bits, **mode}
    return section


def _for_int4(section: dict[str, Any], quant: QuantSpec, paths: list[str]) -> dict[str, Any]:
    section = _without_entries(section, set(paths))
    for key in skip_lists(section):
        kept = [item for item in section[key] if not (isinstance(item, str) and any(matches(item, p) for p in paths))]
        section = {**section, key: kept}
    return override_numbers(section, quant.bits, quant.group_size, None)


def _without_entries(section: Mapping[str, Any], paths: Collection[str]) -> dict[str, Any]:
    """A section without what it says of single modules, however it spells their paths."""
    return {key: value for key, value in section.items() if not (is_entry(key, value) and canonical_path(key) in paths)}


def _changes(before: Mapping[str, Any], after: Mapping[str, Any], where: str = "") -> list[str]:
    """`quantization.bits: 3 -> 4`, one line to a value; entries beyond the twentieth by number."""
    lines: list[str] = []
    for key in dict.fromkeys((*before, *after)):
        old, new = before.get(key), after.get(key)
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += _changes(old, new, f"{where}{key}.")
        else:
            lines.append(f"{where}{key}: {_short(old)} -> {_short(new)}")
    return lines if where or len(lines) <= 20 else [*lines[:20], f"... and {len(lines) - 20} more entries"]


def _short(value: object) -> str:
    text = "nothing" if value is None else ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _some(paths: Sequence[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{len(paths):,} modules ({paths[0]} first)"
