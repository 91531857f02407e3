"""What config.json says of quantization, in every spelling seen in the wild: hints, since the packed shapes decide.

"quantization": {"bits": 4, "group_size": 64, "model.layers.3.mlp.gate_proj": {"bits": 6}, "lm_head": false}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from exo_kimi.checkpoint.keys import canonical_path

SECTIONS = ("quantization", "quantization_config")
_BITS = ("bits", "q_bits", "w_bits", "wbits", "num_bits", "weight_bits")
_GROUP_SIZE = ("group_size", "q_group_size", "w_group_size", "groupsize")
_MODE = ("mode", "q_mode")
_SKIP_LISTS = (
    "modules_to_not_convert",
    "ignore",
    "ignored_layers",
    "ignored_modules",
    "skip",
    "skip_modules",
    "exclude",
    "exclude_modules",
    "modules_to_not_quantize",
    "llm_int8_skip_modules",
)


@dataclass(frozen=True, slots=True)
class Hint:
    """What the config claims of a module; None where it says nothing. `bits` 0 means that it is not quantized."""

    bits: int | None = None
    group_size: int | None = None
    mode: str | None = None

    def describe(self) -> str:
        """`4-bit, group 64`."""
        if self.bits == 0:
            return "not quantized"
        words = [] if self.bits is None else [f"{self.bits}-bit"]
        words += [] if self.group_size is None else [f"group {self.group_size}"]
        words += [] if self.mode in (None, "affine") else [str(self.mode)]
        return ", ".join(words)


PLAIN = Hint(bits=0)


@dataclass(frozen=True, slots=True)
class QuantHints:
    """All hints of one config.json.

    Args:
        default: the hint for every module without an entry.
        entries: the hints for single modules, by canonical path.
        skips: patterns of modules that are not quantized.
        notes: what could not be understood.
        groups: patterns of modules with a hint of their own, as several `config_groups` have them.
    """

    default: Hint = field(default_factory=Hint)
    entries: Mapping[str, Hint] = field(default_factory=dict)
    skips: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    groups: tuple[tuple[str, Hint], ...] = ()

    def for_path(self, path: str) -> tuple[Hint, bool]:
        """The hint for a module and whether it is about this module alone."""
        entry = self.entries.get(path)
        if entry is not None:
            return entry, True
        if any(matches(pattern, path) for pattern in self.skips):
            return PLAIN, True
        group = next((hint for pattern, hint in self.groups if matches(pattern, path)), None)
        return (self.default, False) if group is None else (group, False)


def read_hints(raw_config: Mapping[str, Any]) -> QuantHints:
    """The hints of a config.json; `quantization` (MLX) is asked before `quantization_config` (Hugging Face)."""
    text = raw_config.get("text_config")
    scopes = [raw_config, *([text] if isinstance(text, Mapping) else [])]
    sections = [(name, scope[name]) for name in SECTIONS for scope in scopes if scope.get(name)]
    if not sections:
        return QuantHints()
    name, section = sections[0]
    if not isinstance(section, Mapping):
        return QuantHints(notes=(f"config.json: {name} is not an object and is ignored",))
    notes = []
    if any(other != section for _, other in sections[1:]):
        notes.append(f"config.json: {' and '.join(dict.fromkeys(n for n, _ in sections))} differ; {name} is used")
    entries = {}
    for key, value in section.items():
        if is_entry(key, value):
            entries[canonical_path(key)] = _hint(value) if value else PLAIN
    skips = [pattern for names in _SKIP_LISTS for pattern in _strings(section.get(names))]
    usable = [pattern for pattern in skips if _compiles(pattern)]
    notes += [f"config.json: {name} has a pattern that is no regular expression: {p}" for p in skips if p not in usable]
    default, groups = _config_groups(section)
    return QuantHints(default, entries, tuple(usable), tuple(notes), groups)


def _config_groups(section: Mapping[str, Any]) -> tuple[Hint, tuple[tuple[str, Hint], ...]]:
    """The hint of every module, and those of patterns. A group whose targets are a class (`Linear`) is the default."""
    groups = section.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) < 2:
        return _hint(_group_zero(section) or section), ()
    default, patterns = Hint(), list[tuple[str, Hint]]()
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            continue
        for target in _strings(group.get("targets")):
            if target.isidentifier() and target[0].isupper():
                default = _hint(weights)
            elif _compiles(target):
                patterns.append((target, _hint(weights)))
    return default, tuple(patterns)


def _group_zero(section: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """compressed-tensors nests its numbers; with several groups none of them is a default."""
    groups = section.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        return None
    weights = next(iter(groups.values()))
    weights = weights.get("weights") if isinstance(weights, Mapping) else None
    return weights if isinstance(weights, Mapping) else None


def _hint(values: Mapping[str, Any]) -> Hint:
    bits, group_size, mode = (_first(values, names) for names in (_BITS, _GROUP_SIZE, _MODE))
    if mode is None and values.get("type") == "float" and (bits, group_size) == (4, 32):
        mode = "mxfp4"  # as compressed-tensors says it
    return Hint(
        bits if _is_small(bits) else None,
        group_size if _is_small(group_size) else None,
        mode if isinstance(mode, str) else None,
    )


def _is_small(value: object) -> bool:
    """Whether it is a number that can be meant as bits or a group size; anything else is no hint."""
    return type(value) is int and 0 <= value <= 1_000_000


def _first(values: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((values[name] for name in names if values.get(name) is not None), None)


def _strings(value: object) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _compiles(pattern: str) -> bool:
    if not pattern.startswith("re:"):
        return True
    try:
        re.compile(pattern[3:])
    except re.error:
        return False
    return True


def is_entry(key: str, value: object) -> bool:
    """Whether a key of a section is about one module: it has numbers of its own, or false for a plain one."""
    if isinstance(value, Mapping):
        return any(_first(value, names) is not None for names in (_BITS, _GROUP_SIZE))
    return value is False and ("." in key or key == "lm_head")


def section_scope(raw_config: Mapping[str, Any]) -> tuple[tuple[str, ...], str] | None:
    """Where the section lies that `read_hints` follows: the keys down to its object, and its name; None without one."""
    for name in SECTIONS:
        if raw_config.get(name):
            return (), name
        text = raw_config.get("text_config")
        if isinstance(text, Mapping) and text.get(name):
            return ("text_config",), name
    return None


def skip_lists(section: Mapping[str, Any]) -> list[str]:
    """The keys of a section that list modules which are not quantized."""
    return [name for name in _SKIP_LISTS if isinstance(section.get(name), list)]


def override_numbers(section: Mapping[str, Any], bits: int, group_size: int, mode: str | None) -> dict[str, Any]:
    """A section with other numbers for every module without an entry, where the section keeps them; mode None leaves it."""
    if _group_zero(section) is not None:
        groups = section["config_groups"]
        ((name, group),) = groups.items()
        weights = override_numbers(group["weights"], bits, group_size, mode)
        return {**section, "config_groups": {name: {**group, "weights": weights}}}
    changed = dict(section)
    for value, names in ((bits, _BITS), (group_size, _GROUP_SIZE), (mode, _MODE)):
        used = [name for name in names if name in section] or [names[0]]
        if value is not None:
            changed.update(dict.fromkeys(used, value))
    return changed


def matches(pattern: str, path: str) -> bool:
    """A regular expression (`re:`), a glob, or whole dotted components anywhere in the path (`mlp.gate`, `lm_head`)."""
    if pattern.startswith("re:"):
        # Written for Hugging Face's names: `mlp\\.gate_proj` must not hit `switch_mlp.gate_proj`.
        return re.match(pattern[3:], path.replace(".switch_mlp.", ".experts.0.")) is not None
    pattern = canonical_path(pattern)
    if "*" in pattern:
        return fnmatchcase(path, pattern) or fnmatchcase(path, f"*.{pattern}")
    return f".{pattern}." in f".{path}."
