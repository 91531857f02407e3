"""Recipes: how many bits each module gets, as data.

A recipe file is TOML: `name`, `title`, `source`, a `[rest]` table and `[[rule]]` tables, of which the first that matches
counts. A rule gives `bits` (16 is plain bf16) and `group_size`, or a `mode` of floats (mxfp4, nvfp4, mxfp8), which has both.
It may be limited by `kinds` (embedding, linear, experts), by `names` (parts of paths, such as `down_proj` or `self_attn`), by
`paths` (whole ones, `*` for anything), and by `layers` (`5`, `1-4`, `5-60/5`). What it says of `kv_b_proj` holds for its two
halves, `embed_q` and `unembed_out`, where a checkpoint has those in its place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.modules import ModuleSpec, absorbed_modules, stage_modules
from exo_kimi.checkpoint.quantization import FLOAT_MODES, QuantSpec
from exo_kimi.errors import UsageError
from exo_kimi.planner import data

PLAIN_BITS = 16
BITS = (2, 3, 4, 5, 6, 8, PLAIN_BITS)
GROUPS = (32, 64, 128)
ROUTER_PACKING = QuantSpec(8, 64)
"""Of routers that may be packed, whatever the rest has. Source: quant_predicate of mlx-lm's kimi_linear."""
KINDS = ("embedding", "linear", "experts")
_MODES = {mode: pair for pair, mode in FLOAT_MODES.items()}
_FORMER = {"mixed346": "q34+q6", "dq3": "dq3_k_m-q8", "plain": "bf16"}  # as `exo-kimi tiny` called them until 0.2
_UNIFORM = re.compile(r"uniform-?([234568])")
_LAYERS = re.compile(r"(\d+)(?:-(\d+)(?:/(\d+))?)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Bits for the modules that it matches; empty limits match everything."""

    bits: int
    group_size: int
    mode: str = "affine"
    kinds: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    layers: frozenset[int] | None = None

    def matches(self, spec: ModuleSpec) -> bool:
        """Whether the rule speaks of this module."""
        kind, path = spec.kind, spec.path
        if kind == "heads":  # half of a kv_b_proj, of which the rule speaks
            kind, path = "linear", f"{path.rpartition('.')[0]}.kv_b_proj"
        if self.kinds and kind not in self.kinds:
            return False
        if self.names and not set(self.names) & set(path.split(".")):
            return False
        if self.paths and not any(fnmatchcase(path, pattern) for pattern in self.paths):
            return False
        return self.layers is None or spec.layer in self.layers

    @property
    def limits(self) -> bool:
        """Whether it speaks of some modules only."""
        return bool(self.kinds or self.names or self.paths or self.layers is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Named rules; `hash` is of the file's meaning, not of its name or comments. With `made_biases`, files have none for experts:
    loading makes them from the scales, as official INT4's."""

    name: str
    title: str
    source: str
    rules: tuple[Rule, ...]
    hash: str
    made_biases: bool = False

    def packing(self, spec: ModuleSpec) -> QuantSpec | None:
        """Bits, group size and mode of a module, None where it stays plain: norms and routers always do."""
        if not spec.quantizable:
            return None
        rule = next(rule for rule in self.rules if rule.matches(spec))
        if spec.kind == "router" and rule.bits != PLAIN_BITS:
            return ROUTER_PACKING
        return None if rule.bits == PLAIN_BITS else QuantSpec(rule.bits, rule.group_size, rule.mode)

    def quant(self, spec: ModuleSpec) -> tuple[int, int] | None:
        """Bits and group size of a module for what writes affine codes only.

        Raises:
            UsageError: the recipe gives it another mode.
        """
        packing = self.packing(spec)
        if packing is not None and packing.mode != "affine":
            raise UsageError(
                f"recipe {self.name}: {packing.mode} is not written here",
                expected="affine bits",
                fix="`exo-kimi convert` writes every mode",
            )
        return None if packing is None else (packing.bits, packing.group_size)

    def weight_bytes(self, spec: ModuleSpec) -> int:
        """Bytes of a module as MLX holds it.

        Affine quantization costs `bits` and, per group, a bf16 scale and a bf16 bias: bits + 32 / group_size bits a weight; a
        mode of floats has one byte a group: bits + 8 / group_size.
        Norms, convolutions and most routers stay bf16, the router's correction bias fp32 and decays too, a linear's bias bf16.
        Source: mlx `quantize`.

        Raises:
            UsageError: the group size does not divide the rows.
        """
        weights = spec.parameters
        extra_bytes = 0
        if spec.kind == "decay":
            return weights * 4
        if spec.kind == "router":
            weights -= spec.shape[0]
            extra_bytes = spec.shape[0] * 4
        elif spec.has_bias:
            weights -= spec.shape[0]
            extra_bytes = spec.shape[0] * 2
        packing = self.packing(spec)
        if packing is None:
            return weights * (4 if spec.is_float32 else 2) + extra_bytes
        if spec.shape[-1] % packing.group_size:
            raise UsageError(
                f"recipe {self.name}: groups do not divide the rows of {spec.path}",
                expected=f"a group_size that divides {spec.shape[-1]}",
                found=packing.group_size,
            )
        group_bytes = 4 if packing.mode == "affine" else 1
        return weights * packing.bits // 8 + weights // packing.group_size * group_bytes + extra_bytes

    def widened_bytes(self, spec: ModuleSpec) -> int:
        """Bytes that serving a module takes on top: a router becomes float32."""
        if spec.kind != "router":
            return 0
        return 4 * spec.parameters - self.weight_bytes(spec)

    def modules(self, config: KimiConfig, start_layer: int, end_layer: int) -> tuple[ModuleSpec, ...]:
        """The modules of a layer range in the form that is written with these bits: `embed_q` and `unembed_out` in place of
        `kv_b_proj` where its groups divide their rows, since mlx-lm quantizes a packed `kv_b_proj` a second time.

        Raises:
            SplitError: the range is empty or outside the model.
        """
        specs: list[ModuleSpec] = []
        for spec in stage_modules(config, start_layer, end_layer):
            halves = () if spec.layer is None else absorbed_modules(config, spec.layer)
            packing = self.packing(spec)
            divided = packing is None or all(half.shape[-1] % packing.group_size == 0 for half in halves)
            specs += halves if spec.path.endswith(".kv_b_proj") and divided else [spec]
        return tuple(specs)

    def disk_bytes(self, spec: ModuleSpec) -> int:
        """Bytes of a module in a file."""
        packing = self.packing(spec) if self.made_biases and spec.kind == "experts" else None
        return self.weight_bytes(spec) - (spec.parameters // packing.group_size * 2 if packing else 0)


def recipe_names() -> tuple[str, ...]:
    """Every packaged recipe, by the name that it gives itself; `uniform-N` exists besides."""
    return tuple(sorted(data.load("recipes", stem)["name"] for stem in data.names("recipes")))


def load_recipe(name: str | Path) -> Recipe:
    """A recipe by name (`int4+q8`, `uniform-4`), or from the user's own TOML file; older names of the same are known too.

    Raises:
        UsageError: no such recipe, or a file that is malformed.
    """
    text = _FORMER.get(str(name).lower(), str(name))
    if text.lower() in _MODES:
        same = {"name": text.lower(), "title": f"uniform {text.lower()}", "rest": {"mode": text.lower()}}
        return parse_recipe(same, where=text)
    uniform = _UNIFORM.fullmatch(text.lower())
    if uniform:
        bits = int(uniform[1])
        same = {"name": f"uniform-{bits}", "title": f"uniform {bits}-bit", "rest": {"bits": bits}}
        return parse_recipe(same, where=text)
    for stem in data.names("recipes"):
        table = data.load("recipes", stem)
        if text.lower() in (table["name"], stem):
            return parse_recipe(table, where=f"{stem}.toml")
    if text.endswith(".toml") or "/" in text:
        return parse_recipe(data.read(text, "recipe"), where=text)
    raise UsageError(
        "unknown recipe",
        expected=f"one of {', '.join(recipe_names())}, uniform-2 to uniform-8, {', '.join(_MODES)}, or a .toml file",
        found=repr(text),
        where="--recipe",
    )


def parse_recipe(table: Mapping[str, Any], *, where: object) -> Recipe:
    """A recipe from its table.

    Raises:
        UsageError: unknown keys, bits or groups that MLX does not have, no `[rest]`.
    """
    data.refuse_unknown(dict(table), ("name", "title", "source", "rest", "rule", "made_biases"), where)
    if not isinstance(table.get("rest"), Mapping):
        raise UsageError("a recipe needs a [rest] table", expected="[rest] with bits and group_size", where=where)
    rules = tuple(_rule(dict(entry), where) for entry in (*data.tables(table, "rule", where), table["rest"]))
    if rules[-1].limits:
        raise UsageError("[rest] must match everything", expected="bits and group_size only", where=where)
    meaning = [_meaning(rule) for rule in rules]
    name = str(table.get("name", where))
    return Recipe(
        name=name,
        title=str(table.get("title", name)),
        source=str(table.get("source", "")),
        rules=rules,
        hash=data.digest(meaning),
        made_biases=table.get("made_biases", False) is True,
    )


def _meaning(rule: Rule) -> list[object]:
    """What the hash of a recipe covers; keys that came later only where they are used, so that older hashes stay."""
    layers = None if rule.layers is None else sorted(rule.layers)
    later = [rule.mode, rule.paths] if rule.mode != "affine" or rule.paths else []
    return [rule.bits, rule.group_size, rule.kinds, rule.names, layers, *later]


def _rule(entry: dict[str, Any], where: object) -> Rule:
    data.refuse_unknown(entry, ("bits", "group_size", "mode", "kinds", "names", "paths", "layers"), where)
    bits, group_size, mode = _packing(entry, where)
    layers = None
    if "layers" in entry:
        layers = frozenset(layer for text in data.texts(entry, "layers", where) for layer in _layers(text, where))
    kinds = data.texts(entry, "kinds", where)
    if not set(kinds) <= set(KINDS):
        raise UsageError("a rule for modules that there are not", expected=", ".join(KINDS), found=kinds, where=where)
    return Rule(
        bits=bits,
        group_size=group_size,
        mode=mode,
        kinds=kinds,
        names=data.texts(entry, "names", where),
        paths=data.texts(entry, "paths", where),
        layers=layers,
    )


def _packing(entry: dict[str, Any], where: object) -> tuple[int, int, str]:
    mode = entry.get("mode", "affine")
    if mode in _MODES:
        own_bits, own_group = _MODES[mode]
        if entry.get("bits", own_bits) != own_bits or entry.get("group_size", own_group) != own_group:
            raise UsageError(
                f"{mode} has no choice of bits or groups",
                expected=f"bits {own_bits}, group_size {own_group}, or neither",
                found=f"bits {entry.get('bits')!r}, group_size {entry.get('group_size')!r}",
                where=where,
            )
        return own_bits, own_group, mode
    bits, group_size = entry.get("bits"), entry.get("group_size", 64)
    if bits not in BITS or group_size not in GROUPS or mode != "affine":
        raise UsageError(
            "a rule has bits, a group size or a mode that MLX does not have",
            expected=f"bits of {BITS}, group_size of {GROUPS}; or mode of {', '.join(_MODES)}",
            found=f"bits {bits!r}, group_size {group_size!r}, mode {mode!r}",
            where=where,
        )
    return bits, group_size, mode


def _layers(text: str, where: object) -> range:
    match = _LAYERS.fullmatch(text)
    step = int(match[3] or 1) if match else 0
    if match is None or step < 1:
        raise UsageError("cannot read layers", expected="5, 1-4 or 5-60/5", found=repr(text), where=where)
    return range(int(match[1]), int(match[2] or match[1]) + 1, step)
