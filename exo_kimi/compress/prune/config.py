"""config.json of a pruned checkpoint: everything that counts experts or layers, or names one, tells the truth."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from exo_kimi.arch.keys import EXPERTS_PER_LAYER
from exo_kimi.checkpoint.hints import SECTIONS, skip_lists
from exo_kimi.checkpoint.keys import layer_of
from exo_kimi.compress.prune.plan import PrunePlan
from exo_kimi.compress.prune.tensors import rename_layer

_EXPERT = re.compile(r"(\.experts\.)(\d+)\b")
_BY_LAYER = ("mlp_layer_types", "layer_types")


def pruned_config(raw: Mapping[str, Any], plan: PrunePlan) -> dict[str, Any]:
    """A config.json for what stays; top-k, scaling and groups stay as they are."""
    config: dict[str, Any] = copy.deepcopy(dict(raw))
    if plan.changes_nothing:
        return config
    scopes = [config, *([config["text_config"]] if isinstance(config.get("text_config"), dict) else [])]
    for scope in scopes:
        if "n_routed_experts" in scope:
            scope["n_routed_experts"] = plan.keep
            if not plan.is_uniform:
                scope[EXPERTS_PER_LAYER] = list(plan.counts)
        if "num_hidden_layers" in scope:
            scope["num_hidden_layers"] = len(plan.kept_layers())
        if scope.get("num_nextn_predict_layers"):
            scope["num_nextn_predict_layers"] = 0  # their experts would be as many as before
        for name in _BY_LAYER:
            if isinstance(scope.get(name), list):
                scope[name] = [scope[name][layer] for layer in plan.kept_layers()]
        for section in SECTIONS:
            if isinstance(scope.get(section), dict):
                scope[section] = _section(scope[section], plan)
    return config


def _section(section: Mapping[str, Any], plan: PrunePlan) -> dict[str, Any]:
    """A quantization section: entries of single modules follow them, those of what goes go."""
    changed: dict[str, Any] = {}
    for key, value in section.items():
        name = _renamed(key, plan)
        if name is not None:
            changed[name] = value
    for key in skip_lists(section):
        changed[key] = _patterns(section[key], plan)
    groups = section.get("config_groups")
    if isinstance(groups, dict):
        changed["config_groups"] = {
            name: {**group, "targets": _patterns(group["targets"], plan)}
            if isinstance(group, dict) and isinstance(group.get("targets"), list)
            else group
            for name, group in groups.items()
        }
    return changed


def _patterns(patterns: list[Any], plan: PrunePlan) -> list[Any]:
    """Names of modules follow them; regular expressions and whatever is no text stay."""
    kept = []
    for pattern in patterns:
        plain = isinstance(pattern, str) and not pattern.startswith("re:")
        name = _renamed(pattern, plan) if plain else pattern
        if name is not None:
            kept.append(name)
    return kept


def _renamed(name: str, plan: PrunePlan) -> str | None:
    """A module's path under its new numbers; None where it goes. Other words stay as they are."""
    layer = layer_of(f"{name}.")
    if layer is None:
        return name
    if layer in plan.dropped_layers or layer >= plan.layers:
        return None
    ids, match = plan.kept.get(layer), _EXPERT.search(name)
    if ids is not None and match is not None:
        if int(match[2]) not in ids:
            return None
        name = _EXPERT.sub(rf"\g<1>{ids.index(int(match[2]))}", name)
    return rename_layer(f"{name}.", plan)[:-1]
