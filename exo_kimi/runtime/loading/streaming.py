"""Layers whose experts stay on disk: slots in place of rows, and what fills them while the model runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from exo_kimi.checkpoint.manifest import ModuleSource
from exo_kimi.experts.budget import ExpertCache, check_prefetch, slots_for
from exo_kimi.experts.direct import is_direct
from exo_kimi.experts.layer_cache import LayerCache
from exo_kimi.experts.layout import FLOAT_NAMES, LayerLayout, Leaf, layouts_of
from exo_kimi.experts.packed import packed_layout
from exo_kimi.experts.prefetch import Prefetcher, PrefetchPolicy, places_for
from exo_kimi.experts.store import ExpertStore, Preadv
from exo_kimi.models.expert_bank import ExpertBank, LastOutput, NextLayer, StreamedExperts
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.models.moe import MoE
from exo_kimi.runtime.loading.parameter_memory import ParameterMemory, Target
from exo_kimi.runtime.reserve import host_free_bytes

logger = logging.getLogger(__name__)

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


@dataclass(frozen=True, slots=True)
class SlottedStage:
    """The layers of a stage whose experts do not all fit.

    Args:
        layers: by number.
        places: experts for which there is memory beside the slots, to read ahead into.
    """

    layers: Mapping[int, SlottedLayer]
    places: int = 0

    @property
    def place_bytes(self) -> int:
        """Of one of `places`: any layer's expert fits."""
        return max((each.layout.slot_bytes for each in self.layers.values()), default=0)


def slotted_layers(
    sources: Sequence[ModuleSource], cache: ExpertCache | None, *, dtype: str | None, chosen: int, directory: Path
) -> SlottedStage:
    """The layers whose experts do not all fit.

    Args:
        sources: of a stage.
        cache: what it may hold; None holds all.
        dtype: of floating parameters, see `loader.load`.
        chosen: experts of a token.
        directory: the checkpoint, which may have packed records of its experts (see `experts.packed`).

    Raises:
        UsageError: the budget is too small, or there is no such way of reading ahead.
    """
    layouts = {} if cache is None else layouts_of(sources, floats=FLOAT_NAMES[dtype] if dtype else None)
    if cache is None or not layouts:
        return SlottedStage({})
    experts = {layer: layout.experts for layer, layout in layouts.items()}
    slot_bytes = {layer: layout.slot_bytes for layer, layout in layouts.items()}
    slots, places = slots_for(cache.budget_bytes, slot_bytes, experts), 0
    if slots != experts:
        check_prefetch(cache.prefetch)
        places = places_for(cache.prefetch, cache.budget_bytes, slot_bytes.values(), chosen)
        slots = slots_for(cache.budget_bytes - places * max(slot_bytes.values()), slot_bytes, experts)
    layers = {
        layer: SlottedLayer(packed_layout(layouts[layer], directory), count)
        for layer, count in slots.items()
        if count < experts[layer]
    }
    return SlottedStage(layers, places)


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
    stage: SlottedStage,
    views: Mapping[int, list[list[dict[str, memoryview]]]],
    *,
    directory: Path,
    cache: ExpertCache,
    preadv: Preadv = os.preadv,
) -> None:
    """Have layers read the experts that they are asked for; their files are open from now on.

    Args:
        model: of the layers.
        stage, views: see `slot_memory`.
        directory: the checkpoint.
        cache: how slots are used.
        preadv: reads.

    Raises:
        TensorFileError: a file cannot be opened.
        UsageError: no such policy or way of reading, or no profile of a layer.
    """
    streamed_bytes = sum((each.layout.experts - each.slots) * each.layout.disk_bytes for each in stage.layers.values())
    direct = is_direct(cache.reads, streamed_bytes=streamed_bytes, free_bytes=_page_cache_bytes())
    store = ExpertStore(directory, preadv=preadv, direct=direct)
    prefetcher: Prefetcher | None = None
    if stage.places:
        memory = np.zeros(stage.places * stage.place_bytes, np.uint8).data
        places = [memory[start : start + stage.place_bytes] for start in range(0, len(memory), stage.place_bytes)]
        prefetcher = Prefetcher(store, PrefetchPolicy(cache.prefetch, max(1, stage.places // 2)), places)
    banks: dict[int, ExpertBank] = {}
    last = LastOutput()
    for layer, slotted in stage.layers.items():
        store.open(slotted.layout)
        slots = LayerCache(slotted.slots, cache.policy_of(layer, slotted.slots))
        banks[layer] = ExpertBank(slotted.layout, slots, store, views[layer], last, prefetcher)
        mixture_at(model, layer).switch_mlp.bank = banks[layer]
        if prefetcher is not None and layer - 1 in banks:
            banks[layer - 1].next_layer = NextLayer(banks[layer], _guess(model, layer))
    model.streamed = StreamedExperts(store, banks, prefetcher, stage.places * stage.place_bytes)
    logger.info(
        "%d of %d experts in %d layers have a slot, the others are read %s, %d places to read ahead (%s)",
        model.streamed.slots,
        sum(bank.layout.experts for bank in banks.values()),
        len(banks),
        "past the page cache" if store.is_direct else "through the page cache",
        stage.places,
        cache.prefetch,
    )


def _page_cache_bytes() -> int:
    """Memory that the system could fill with what is read. A Mac does not say: what MLX and a reserve leave of all there is."""
    if not mx.metal.is_available():
        return host_free_bytes()
    total_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(0, total_bytes - int(mx.get_active_memory()) - total_bytes // 8)


def _guess(model: Model, layer: int) -> Callable[[mx.array], mx.array]:
    """What a layer's router makes of the input of the router before it: h / rms(h) times the norm's weights, which differ."""
    before, after = (model.layers[number - model.start_layer].post_attention_layernorm for number in (layer - 1, layer))
    old, new = (norm.weight.astype(mx.float32) for norm in (before, after))
    scale = mx.where(old == 0, 0.0, new / mx.where(old == 0, 1.0, old))
    mx.eval(scale)
    router = mixture_at(model, layer).gate
    count = router.chosen + router.chosen // 2
    return lambda x: router.best(x.astype(mx.float32) * scale, count)


def mixture_at(model: Model, layer: int) -> MoE:
    """The mixture of experts of a layer that has one."""
    mixture = model.layers[layer - model.start_layer].mlp
    assert isinstance(mixture, MoE)
    return mixture
