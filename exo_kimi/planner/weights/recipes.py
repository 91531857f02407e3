"""Recipes: how many bits each module gets, as data.

A recipe file is TOML: `name`, `title`, `source`, a `[rest]` table and `[[rule]]` tables, of which the first that matches
counts. A rule gives `bits` (16 is plain bf16) and `group_size`, and may be limited by `kinds` (embedding, linear, heads,
experts), by `names` (the last parts of paths, such as `down_proj` or `self_attn`), and by `layers` (`5`, `1-4`, `5-60/5`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exo_kimi.arch.modules import ModuleSpec
from exo_kimi.errors import UsageError
from exo_kimi.planner import data

PLAIN_BITS = 16
BITS = (2, 3, 4, 5, 6, 8, PLAIN_BITS)
GROUPS = (32, 64, 128)
KINDS = ("embedding", "linear", "heads", "experts")
_FORMER = {"mixed346": "q34+q6", "dq3": "dq3_k_m-q8", "plain": "bf16"}  # as `exo-kimi tiny` called them until 0.2
_UNIFORM = re.compile(r"uniform-?([234568])")
_LAYERS = re.compile(r"(\d+)(?:-(\d+)(?:/(\d+))?)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Bits for the modules that it matches; empty limits match everything."""

    bits: int
    group_size: int
    kinds: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    layers: frozenset[int] | None = None

    def matches(self, spec: ModuleSpec) -> bool:
        """Whether the rule speaks of this module."""
        if self.kinds and spec.kind not in self.kinds:
            return False
        if self.names and not set(self.names) & set(spec.path.split(".")):
            return False
        return self.layers is None or spec.layer in self.layers


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

    def quant(self, spec: ModuleSpec) -> tuple[int, int] | None:
        """Bits and group size of a module, None where it stays plain: norms and routers always do."""
        if not spec.quantizable:
            return None
        rule = next(rule for rule in self.rules if rule.matches(spec))
        return None if rule.bits == PLAIN_BITS else (rule.bits, rule.group_size)

    def weight_bytes(self, spec: ModuleSpec) -> int:
        """Bytes of a module as MLX holds it.

        Affine quantization costs `bits` and, per group, a bf16 scale and a bf16 bias: bits + 32 / group_size bits a weight.
        Norms and routers stay bf16, the router's correction bias fp32, a linear's bias bf16. Source: mlx `quantize`.

        Raises:
            UsageError: the group size does not divide the rows.
        """
        weights = spec.parameters
        extra_bytes = 0
        if spec.kind == "router":
            weights -= spec.shape[0]
            extra_bytes = spec.shape[0] * 4
        elif spec.has_bias:
            weights -= spec.shape[0]
            extra_bytes = spec.shape[0] * 2
        quant = self.quant(spec)
        if quant is None:
            return weights * 2 + extra_bytes
        bits, group_size = quant
        if spec.shape[-1] % group_size:
            raise UsageError(
                f"recipe {self.name}: groups do not divide the rows of {spec.path}",
                expected=f"a group_size that divides {spec.shape[-1]}",
                found=group_size,
            )
        return weights * bits // 8 + weights // group_size * 4 + extra_bytes

    def disk_bytes(self, spec: ModuleSpec) -> int:
        """Bytes of a module in a file."""
        made = self.made_biases and spec.kind == "experts" and self.quant(spec)
        return self.weight_bytes(spec) - (spec.parameters // made[1] * 2 if made else 0)


def recipe_names() -> tuple[str, ...]:
    """Every packaged recipe, by the name that it gives itself; `uniform-N` exists besides."""
    return tuple(sorted(data.load("recipes", stem)["name"] for stem in data.names("recipes")))


def load_recipe(name: str | Path) -> Recipe:
    """A recipe by name (`int4+q8`, `uniform-4`), or from the user's own TOML file; older names of the same are known too.

    Raises:
        UsageError: no such recipe, or a file that is malformed.
    """
    text = _FORMER.get(str(name).lower(), str(name))
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
        expected=f"one of {', '.join(recipe_names())}, uniform-2 to uniform-8, or a .toml file",
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
    if rules[-1].kinds or rules[-1].names or rules[-1].layers is not None:
        raise UsageError("[rest] must match everything", expected="bits and group_size only", where=where)
    meaning = [[r.bits, r.group_size, r.kinds, r.names, None if r.layers is None else sorted(r.layers)] for r in rules]
    name = str(table.get("name", where))
    return Recipe(
        name=name,
        title=str(table.get("title", name)),
        source=str(table.get("source", "")),
        rules=rules,
        hash=data.digest(meaning),
        made_biases=table.get("made_biases", False) is True,
    )


def _rule(entry: dict[str, Any], where: object) -> Rule:
    data.refuse_unknown(entry, ("bits", "group_size", "kinds", "names", "layers"), where)
    bits, group_size = entry.get("bits"), entry.get("group_size", 64)
    if bits not in BITS or group_size not in GROUPS:
        raise UsageError(
            "a rule has bits or a group size that MLX does not have",
            expected=f"bits of {BITS}, group_size of {GROUPS}",
            found=f"bits {bits!r}, group_size {group_size!r}",
            where=where,
        )
    layers = None
    if "layers" in entry:
        layers = frozenset(layer for text in data.texts(entry, "layers", where) for layer in _layers(text, where))
    kinds, found_names = data.texts(entry, "kinds", where), data.texts(entry, "names", where)
    if not set(kinds) <= set(KINDS):
        raise UsageError("a rule for modules that there are not", expected=", ".join(KINDS), found=kinds, where=where)
    return Rule(bits=bits, group_size=group_size, kinds=kinds, names=found_names, layers=layers)


def _layers(text: str, where: object) -> range:
    match = _LAYERS.fullmatch(text)
    step = int(match[3] or 1) if match else 0
    if match is None or step < 1:
        raise UsageError("cannot read layers", expected="5, 1-4 or 5-60/5", found=repr(text), where=where)
    return range(int(match[1]), int(match[2] or match[1]) + 1, step)
