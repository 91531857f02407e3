"""A trace of a live model, replayed, counts what the model's own slots counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import resolve
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.experts.budget import ExpertCache
from exo_kimi.experts.layout import layouts_of
from exo_kimi.experts.traces.replay import replay
from exo_kimi.experts.traces.trace import ExpertTrace, read_trace
from exo_kimi.models.expert_bank import ExpertBank
from exo_kimi.runtime.loading.loader import load_stage

EXPERTS, CHOSEN = 8, 4
CONFIG = {"num_hidden_layers": 3, "n_routed_experts": EXPERTS, "num_experts_per_tok": CHOSEN}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("live") / "tiny", config=CONFIG)


@pytest.mark.parametrize(("slots", "policy"), [(2, "lru"), (3, "slru"), (5, "lru"), (5, "lfu"), (7, "s3fifo")])
def test_a_replay_counts_what_the_live_slots_counted(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slots: int, policy: str
) -> None:
    """A prompt in two chunks, two sequences together, then single tokens: hits, misses and evictions of each layer."""
    manifest = resolve(open_index(directory))
    layouts = layouts_of(manifest.sources, floats="F32")
    budget_bytes = slots * sum(layout.slot_bytes for layout in layouts.values())
    model = load_stage(manifest, dtype="float32", expert_cache=ExpertCache(budget_bytes=budget_bytes, policy=policy))
    assert model.streamed is not None
    banks = model.streamed.banks
    rows: dict[int, list[Any]] = {layer: [] for layer in banks}
    layer_of = {id(bank): layer for layer, bank in banks.items()}
    real = ExpertBank.run

    def watched(self: ExpertBank, indices: mx.array, *rest: Any) -> mx.array:
        rows[layer_of[id(self)]].append(np.array(indices).reshape(-1, CHOSEN))
        return real(self, indices, *rest)

    monkeypatch.setattr(ExpertBank, "run", watched)
    random = np.random.default_rng(slots)
    caches, other = model.make_cache(), model.make_cache()

    def step(*parts: tuple[int, Any]) -> None:
        ids = mx.array(random.integers(0, 200, sum(count for count, _ in parts)).astype(np.int32))
        mx.eval(model.forward_ragged(ids, list(parts)))

    step((9, caches))
    step((5, caches))
    step((3, other), (1, caches))
    for _ in range(25):
        step((1, caches), (1, other))
    for _ in range(15):
        step((1, caches))
    calls = np.array([len(each) for each in rows[min(rows)]], np.int32)
    trace = ExpertTrace(
        ids=np.stack([np.concatenate(rows[layer]) for layer in sorted(rows)]).astype(np.uint8),
        experts=EXPERTS,
        layers=tuple(sorted(rows)),
        calls=calls,
        source="live",
    )
    assert calls.tolist() == [9, 5, 4, *[2] * 25, *[1] * 15]
    trace.save(tmp_path / "live.npz")
    again = replay(read_trace(tmp_path / "live.npz"), policy, slots)
    live = [banks[layer].cache.counters for layer in sorted(banks)]
    assert [(c.hits, c.misses, c.evictions) for c in again.layers] == [(c.hits, c.misses, c.evictions) for c in live]
    assert model.streamed.store.counters.experts == again.misses
