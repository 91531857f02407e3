"""A pruning plan: which experts of each layer stay, and which layers; its file, strictly read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.keys import EXPERTS_PER_LAYER
from exo_kimi.checkpoint.text_files import read_json
from exo_kimi.errors import UsageError

VERSION = 1
PLAN_NAME = "exo-kimi-prune.json"
"""The plan inside a pruned checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunePlan:
    """What stays of a model.

    Args:
        layers: decoder layers of the original.
        experts: of each of its MoE layers.
        kept: MoE layer of the original -> ids of the experts that stay, ascending.
        dropped_layers: of the original, ascending.
        criterion: what the experts were ranked by.
        domain: what the texts behind the ranking are about.
        source: how they were chosen, in a sentence for the card.
        fingerprint: of the checkpoint that was calibrated; empty where none was.
    """

    layers: int
    experts: int
    kept: Mapping[int, tuple[int, ...]]
    dropped_layers: tuple[int, ...] = ()
    criterion: str = ""
    domain: str = ""
    source: str = ""
    fingerprint: str = ""

    @property
    def keep(self) -> int:
        """Experts that stay in each layer; the most of any, where layers keep different numbers."""
        return max(self.counts, default=self.experts)

    @property
    def counts(self) -> tuple[int, ...]:
        """Experts of each layer that stays, 0 where it is dense."""
        return tuple(len(self.kept.get(layer, ())) for layer in self.kept_layers())

    @property
    def is_uniform(self) -> bool:
        """Whether every layer keeps as many."""
        return len(set(filter(None, self.counts))) <= 1

    @property
    def keep_text(self) -> str:
        """`288`, or `250 to 310` where layers keep different numbers."""
        return str(self.keep) if self.is_uniform else f"{min(filter(None, self.counts))} to {self.keep}"

    @property
    def share(self) -> float:
        """Of all experts that the original has, what stays: dropped layers keep none."""
        total = self.experts * len(self.kept)
        left = sum(len(ids) for layer, ids in self.kept.items() if layer not in self.dropped_layers)
        return left / total if total else 1.0

    @property
    def changes_nothing(self) -> bool:
        """Whether everything stays."""
        return not self.dropped_layers and all(len(ids) == self.experts for ids in self.kept.values())

    @property
    def hash(self) -> str:
        """Of what stays; not of why."""
        meaning = [self.layers, self.experts, sorted(self.kept.items()), self.dropped_layers]
        return f"sha256:{hashlib.sha256(json.dumps(meaning).encode()).hexdigest()}"

    def kept_layers(self) -> tuple[int, ...]:
        """Layers of the original that stay, in order: their place is their new number."""
        return tuple(layer for layer in range(self.layers) if layer not in self.dropped_layers)

    def check(self, config: KimiConfig) -> None:
        """Refuse a plan that this model cannot be cut by.

        Raises:
            UsageError: it is for another architecture, keeps fewer experts than a token chooses, or keeps them unevenly over
                the router's groups.
        """
        moe = [layer for layer in range(config.num_hidden_layers) if config.is_moe(layer)]
        if not config.is_even:
            raise UsageError(
                "a checkpoint whose layers have different numbers of experts is not pruned again",
                expected="one n_routed_experts",
                found=f"{EXPERTS_PER_LAYER} in config.json",
                fix="prune the original to fewer",
            )
        if (self.layers, self.experts, sorted(self.kept)) != (config.num_hidden_layers, config.n_routed_experts, moe):
            raise UsageError(
                "the plan is for another model",
                expected=f"{len(moe)} MoE layers of {config.num_hidden_layers}, {config.n_routed_experts} experts each",
                found=f"{len(self.kept)} of {self.layers}, {self.experts}",
            )
        for layer, ids in self.kept.items():
            if list(ids) != sorted(set(ids)) or (ids and not 0 <= ids[0] <= ids[-1] < self.experts):
                raise UsageError(
                    f"layer {layer}: kept experts are no ascending ids",
                    expected=f"ids from 0 to {self.experts - 1}, each once",
                    found=str(list(ids))[:80],
                )
            check_count(config, len(ids))
            per_group = self.experts // config.n_group
            counts = [sum(expert // per_group == group for expert in ids) for group in range(config.n_group)]
            if len(set(counts)) > 1:
                raise UsageError(
                    f"layer {layer}: the router's groups would have unequal numbers of experts",
                    expected=f"{len(ids) // config.n_group} in each of {config.n_group} groups",
                    found=counts,
                )
        self._check_layers(config)

    def _check_layers(self, config: KimiConfig) -> None:
        if not self.dropped_layers:
            return
        dense = set(range(config.first_k_dense_replace))
        pinned = {0, config.num_hidden_layers - 1, *dense}
        wrong = sorted(set(self.dropped_layers) & pinned) or [
            layer for layer in self.dropped_layers if not 0 <= layer < config.num_hidden_layers
        ]
        if wrong or config.moe_layer_freq != 1:
            raise UsageError(
                "these layers cannot be dropped",
                expected=f"layers {max(pinned - {config.num_hidden_layers - 1}) + 1} to {config.num_hidden_layers - 2}: "
                "the dense ones, the first and the last stay",
                found=wrong or f"moe_layer_freq {config.moe_layer_freq}, which counts layers by their numbers",
                where="--drop-layers",
            )

    def to_json(self) -> str:
        """The text of a plan file."""
        return (
            json.dumps(
                {
                    "version": VERSION,
                    "layers": self.layers,
                    "experts": self.experts,
                    "kept": {str(layer): list(ids) for layer, ids in sorted(self.kept.items())},
                    "dropped_layers": list(self.dropped_layers),
                    "criterion": self.criterion,
                    "domain": self.domain,
                    "source": self.source,
                    "fingerprint": self.fingerprint,
                    "hash": self.hash,
                }
            )
            + "\n"
        )


def check_count(config: KimiConfig, keep: int) -> None:
    """Refuse a number of experts that the router cannot choose from.

    Raises:
        UsageError: it is below top-k, above what there is, or no multiple of the groups.
    """
    chosen, groups, experts = config.num_experts_per_tok, config.n_group, config.n_routed_experts
    least = max(chosen, -(-chosen * groups // config.topk_group))
    if not least <= keep <= experts or keep % groups:
        many = f", a multiple of n_group {groups}" if groups > 1 else ""
        raise UsageError(
            "not a number of experts that can stay",
            expected=f"{least} to {experts}{many}: num_experts_per_tok {chosen} stays as it is",
            found=keep,
            where="--keep",
        )


def everything(config: KimiConfig) -> PrunePlan:
    """The plan that keeps all."""
    ids = tuple(range(config.n_routed_experts))
    kept = {layer: ids for layer in range(config.num_hidden_layers) if config.is_moe(layer)}
    return PrunePlan(layers=config.num_hidden_layers, experts=config.n_routed_experts, kept=kept)


def read_plan(path: Path) -> PrunePlan:
    """Read a plan file.

    Raises:
        UsageError: no such file, or it is not a plan of `exo-kimi prune`.
    """
    try:
        raw: Any = read_json(path)
        if raw["version"] != VERSION:
            raise ValueError(f"version {raw['version']}")
        plan = PrunePlan(
            layers=int(raw["layers"]),
            experts=int(raw["experts"]),
            kept={int(layer): tuple(map(int, ids)) for layer, ids in raw["kept"].items()},
            dropped_layers=tuple(map(int, raw["dropped_layers"])),
            criterion=str(raw["criterion"]),
            domain=str(raw["domain"]),
            source=str(raw["source"]),
            fingerprint=str(raw["fingerprint"]),
        )
        if raw["hash"] != plan.hash:
            raise ValueError("its hash is that of another plan: it was edited")
        return plan
    except OSError as error:
        raise UsageError("the plan cannot be read", found=error.strerror, where=path) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            "not a pruning plan",
            expected=f"what `exo-kimi prune DIR -o PLAN.json` writes, version {VERSION}",
            found=f"{type(error).__name__}: {error}",
            where=path,
        ) from None
