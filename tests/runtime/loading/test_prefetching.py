"""Experts read ahead for the next layer: the same numbers, slots and hits as without, every byte counted, and in which order."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import resolve
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.experts import store
from exo_kimi.experts.budget import ExpertCache
from exo_kimi.experts.layout import layouts_of
from exo_kimi.models.expert_bank import StreamedExperts
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.models.moe import MLP, SlottedExperts
from exo_kimi.runtime.loading.loader import load, load_stage

EXPERTS, CHOSEN = 16, 4
SMALL = {
    "num_hidden_layers": 4,
    "hidden_size": 192,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("ahead"), seed=7, config=SMALL, layout="int4")


def streaming(directory: Path, slots: int, prefetch: str) -> Model:
    """With so many slots a layer, and memory for reading ahead beside them."""
    sizes = [layout.slot_bytes for layout in layouts_of(resolve(open_index(directory)).sources, floats="F32").values()]
    budget_bytes = slots * sum(sizes) + (2 * CHOSEN * max(sizes) if prefetch == "on" else 0)
    cache = ExpertCache(budget_bytes=budget_bytes, prefetch=prefetch)
    model = load_stage(resolve(open_index(directory)), dtype="float32", fuse=True, expert_cache=cache)
    assert {bank.cache.slots for bank in streamed(model).banks.values()} == {slots}
    return model


def streamed(model: Model) -> StreamedExperts:
    assert model.streamed is not None
    return model.streamed


def run(model: Model, lengths: Sequence[int] = (9, 3), steps: int = 12) -> list[Any]:
    """Logits of prompts and then of single tokens of each."""
    caches = [model.make_cache() for _ in lengths]
    tokens = mx.array((np.arange(sum(lengths)) * 7919 % 1000).astype(np.int32))
    outputs = [model.logits(model.forward_ragged(tokens, list(zip(lengths, caches, strict=True))))]
    token = mx.argmax(outputs[0][mx.array((np.cumsum(lengths) - 1).tolist())], axis=-1).astype(mx.int32)
    for _ in range(steps):
        outputs.append(model.logits(model.forward_ragged(token, [(1, cache) for cache in caches])))
        token = mx.argmax(outputs[-1], axis=-1).astype(mx.int32)
    mx.eval(outputs)
    return [np.array(each).tolist() for each in outputs]


def settled(model: Model) -> store.ReadCounters:
    """Once no read is under way any more."""
    for task in [streamed(model).store._pool.submit(threading.Event().wait, 0.001) for _ in range(32)]:
        task.result()
    return streamed(model).store.counters


@pytest.mark.parametrize("inline_bytes", [0, store.INLINE_BYTES], ids=["by the pool", "small reads at once"])
@pytest.mark.parametrize("slots", [1, 4, 6, 12])
def test_numbers_slots_and_hits_are_those_of_a_layer_that_reads_nothing_ahead(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, slots: int, inline_bytes: int
) -> None:
    monkeypatch.setattr(store, "INLINE_BYTES", inline_bytes)
    resident = run(load(checkpoint, dtype="float32", fuse=True))
    plain, ahead = streaming(checkpoint, slots, "off"), streaming(checkpoint, slots, "on")
    assert run(plain) == run(ahead) == resident
    # Nothing that is held gave way to a guess: what was hit, read and given up, and what is held now, are the same.
    assert streamed(ahead).counters == streamed(plain).counters
    held = [[bank.cache.held for bank in streamed(model).banks.values()] for model in (ahead, plain)]
    assert held[0] == held[1]
    counters = settled(ahead)
    each = next(iter(streamed(ahead).banks.values())).layout.disk_bytes
    assert counters.prefetch_used_bytes > 0
    assert counters.prefetched_bytes == counters.prefetch_used_bytes + counters.prefetch_wasted_bytes
    assert counters.read_bytes == streamed(ahead).counters.misses * each + counters.prefetch_wasted_bytes
    assert settled(plain).prefetched_bytes == 0


def test_memory_is_given_back_whatever_becomes_of_a_guess(checkpoint: Path) -> None:
    model = streaming(checkpoint, 4, "on")
    for lengths in ((1,), (40,), (2, 1, 5)):
        run(model, lengths)
    prefetcher = streamed(model).prefetcher
    assert prefetcher is not None
    settled(model)
    assert not any(prefetcher._reads.values())
    assert len(prefetcher._free) == 2 * CHOSEN
    assert streamed(model).prefetch_memory_bytes == sum(len(place) for place in prefetcher._free)


def test_a_guess_whose_read_fails_is_read_again_when_it_is_asked_for(checkpoint: Path) -> None:
    model, expected = streaming(checkpoint, 4, "on"), run(streaming(checkpoint, 4, "off"))
    real, failed = streamed(model).store._preadv, 0

    def broken(descriptor: int, buffers: Sequence[memoryview], position: int) -> int:
        nonlocal failed
        if threading.current_thread() is not threading.main_thread() and failed < 40:
            failed += 1
            raise OSError(5, "Input/output error")
        return real(descriptor, buffers, position)

    streamed(model).store._preadv = broken  # what is asked for is little, and read by the thread that waits
    assert run(model) == expected
    assert failed == 40
    assert settled(model).failed == 0


class Events:
    """What happened, in order."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def before(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def told(*args: Any, **options: Any) -> Any:
            self.seen.append(name)
            return function(*args, **options)

        return told


def test_a_layer_begins_everything_before_it_waits(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared experts are on their way before ids are read back, what is there computes while the rest is read, and reads for the
    next layer begin before this layer's experts are computed."""
    monkeypatch.setattr(store, "INLINE_BYTES", 0)
    model = streaming(checkpoint, 6, "on")
    run(model, (1,), steps=6)
    events, gate = Events(), threading.Event()
    reading = streamed(model).store

    def slow(descriptor: int, buffers: Sequence[memoryview], position: int) -> int:
        assert gate.wait(30)
        return os.preadv(descriptor, buffers, position)

    def waits(pending: store.PendingRead) -> None:
        events.seen.append("wait")
        gate.set()
        real_wait(pending)

    real_wait = store.PendingRead.wait
    reading._preadv = slow
    monkeypatch.setattr(store.PendingRead, "wait", waits)
    monkeypatch.setattr(MLP, "decode", events.before("shared", MLP.decode))
    monkeypatch.setattr(reading, "begin", events.before("read", reading.begin))
    monkeypatch.setattr(reading, "prefetch", events.before("read ahead", reading.prefetch))
    monkeypatch.setattr(SlottedExperts, "some", events.before("compute", SlottedExperts.some))
    monkeypatch.setattr(SlottedExperts, "whole", events.before("compute", SlottedExperts.whole))
    monkeypatch.setattr("exo_kimi.models.expert_bank.np.array", events.before("back", np.array))
    monkeypatch.setattr("exo_kimi.models.expert_bank.mx.async_eval", events.before("begin", mx.async_eval))
    layers = []
    for token in (17, 230, 5, 91):
        caches = model.make_cache()
        events.seen.clear()
        gate.clear()
        hidden = model.forward_ragged(mx.array([token], mx.int32), [(1, caches)])
        gate.set()
        mx.eval(hidden)
        text = " ".join(events.seen)
        layers += [f"shared {layer}" for layer in text.split("shared ")[2:]]  # the first is the dense layer's
    # A layer with some there and some missing, and a next layer that misses guesses.
    full = [layer for layer in layers if "read ahead" in layer and "compute wait" in layer.replace("begin ", "")]
    assert full
    for layer in full:
        words = layer.replace("read ahead", "ahead").split()
        first = {word: words.index(word) for word in set(words)}
        # Router and shared experts are begun, then the ids come back, reads begin, and what is there computes before the wait.
        assert words[:4] == ["shared", "begin", "begin", "back"]
        assert first["back"] < first["read"] < first["ahead"] < first["compute"] < first["wait"]
        assert words[first["compute"] + 1] == "begin"
