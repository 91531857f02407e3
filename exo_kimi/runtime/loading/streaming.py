"""Layers whose experts stay on disk: slots in place of rows, and what fills them while the model runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from exo_kimi.checkpoint.manifest import ModuleSource
from exo_kimi.experts.budget import ExpertCache, slots_for
from exo_kimi.experts.layer_cache import LayerCache
from exo_kimi.experts.layout import FLOAT_NAMES, LayerLayout, Leaf, layouts_of
from exo_kimi.experts.policies import make_policy
from exo_kimi.experts.store import ExpertStore, Preadv
from exo_kimi.models.expert_bank import ExpertBank, LastOutput, StreamedExperts
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.models.moe import MoE
from exo_kimi.runtime.loading.parameter_memory import ParameterMemory, Target

_DTYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32, "U32": mx.uint32, "U8": mx.uint8}


@dataclass(frozen=True, slots=True)
class SlottedLayer:
    """A layer that is to hold fewer experts than it has."""

    layout: LayerLayout
    slots: int

    def targets(self) -> dict[str, Target]:
        """Its parameters, by path: a row for each slot."""
        return {
            f"{projection.path}.{leaf.name}": Target((self.slots, *leaf.shape), _DTYPES[leaf.dtype], parts=self.slots)
            for projection in self.layout.projections
            for leaf in projection.leaves
        }


def slotted_layers(
    sources: Sequence[ModuleSource], cache: ExpertCache | None, *, dtype: str | None
) -> dict[int, SlottedLayer]:
    """The layers whose experts do not all fit, by number.

    Args:
        sources: of a stage.
        cache: what it may hold; None holds all.
        dtype: of floating parameters, see `loader.load`.

    Raises:
        UsageError: the budget is too small.
    """
    if cache is None:
        return {}
    layouts = layouts_of(sources, floats=FLOAT_NAMES[dtype] if dtype else None)
    if not layouts:
        return {}
    experts = next(iter(layouts.values())).experts
    slots = slots_for(cache.budget_bytes, {layer: layout.slot_bytes for layer, layout in layouts.items()}, experts)
    return {layer: SlottedLayer(layouts[layer], count) for layer, count in slots.items() if count < experts}


def slot_memory(
    layers: Mapping[int, SlottedLayer], targets: Mapping[str, object], memory: ParameterMemory
) -> dict[int, list[list[dict[str, memoryview]]]]:
    """The bytes of every slot, written once so that they count as used; by layer, slot and projection.

    Args:
        layers: whose slots.
        targets: the parameters of the model, by path.
        memory: of these.
    """

    def view(path: str, leaf: Leaf, slot: int) -> memoryview:
        target = targets[f"{path}.{leaf.name}"]
        assert isinstance(target, Target)
        (piece,) = memory.pieces(target, slot)
        np.frombuffer(piece, np.uint8)[:] = 0
        return piece

    return {
        layer: [
            [{leaf.name: view(each.path, leaf, slot) for leaf in each.leaves} for each in slotted.layout.projections]
            for slot in range(slotted.slots)
        ]
        for layer, slotted in layers.items()
    }


def attach_banks(
    model: Model,
    layers: Mapping[int, SlottedLayer],
    views: Mapping[int, list[list[dict[str, memoryview]]]],
    *,
    directory: Path,
    policy: str,
    preadv: Preadv = os.preadv,
) -> None:
    """Have layers read the experts that they are asked for; their files are open from now on.

    Args:
        model: of the layers.
        layers, views: see `slot_memory`.
        directory: the checkpoint.
        policy: by name.
        preadv: reads.

    Raises:
        TensorFileError: a file cannot be opened.
        UsageError: no such policy.
    """
    store = ExpertStore(directory, preadv=preadv)
    banks: dict[int, ExpertBank] = {}
    last = LastOutput()
    for layer, slotted in layers.items():
        store.open(slotted.layout)
        cache = LayerCache(slotted.slots, make_policy(policy, slots=slotted.slots))
        banks[layer] = ExpertBank(slotted.layout, cache, store, views[layer], last)
        mixture_at(model, layer).switch_mlp.bank = banks[layer]
    model.streamed = StreamedExperts(store, banks)


def mixture_at(model: Model, layer: int) -> MoE:
    """The mixture of experts of a layer that has one."""
    mixture = model.layers[layer - model.start_layer].mlp
    assert isinstance(mixture, MoE)
    return mixture
