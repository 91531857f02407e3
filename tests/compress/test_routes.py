"""Recorded routes are those of the whole model, and real texts ask of the trained tiny Kimi what the reference measured."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import exo_kimi
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.cli.app import run
from exo_kimi.compress.layers import LayerWalk
from exo_kimi.compress.routes import record
from exo_kimi.compress.texts.encoding import Encoded
from exo_kimi.errors import UsageError
from exo_kimi.experts.policies import POLICY_NAMES
from exo_kimi.experts.traces.replay import replay
from exo_kimi.experts.traces.trace import read_trace
from exo_kimi.models.moe import Router
from exo_kimi.runtime.loading.loader import load_stage
from exo_kimi.train.data.conversations import training_conversation

TRAINED = Path(exo_kimi.__file__).parent / "data" / "tiny-kimi-k2"
# Least recently used and Belady of 16 experts, 4 a token. Source: reference/experts.md, other texts of the same kind.
MEASURED = {4: (0.357, 0.357), 6: (0.486, 0.628), 8: (0.628, 0.774), 12: (0.853, 0.931)}


def test_a_recorded_trace_is_what_the_whole_model_routes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(make_tiny(tmp_path / "tiny"))
    random = np.random.default_rng(0)
    ids = [random.integers(0, 200, length).astype(np.int32) for length in (30, 9)]
    texts = [Encoded(ids=each, counted=np.ones(len(each), bool), domain="x") for each in ids]
    trace = record(LayerWalk(checkpoint=checkpoint, dtype="float32"), texts)
    routed: list[Any] = []
    real = Router.__call__

    def watched(self: Router, x: mx.array) -> tuple[mx.array, mx.array]:
        found = real(self, x)
        routed.append(np.array(found[0]))
        return found

    monkeypatch.setattr(Router, "__call__", watched)
    model = load_stage(checkpoint.manifest(), dtype="float32")
    whole = mx.array(np.concatenate(ids))
    mx.eval(model.forward_ragged(whole, [(len(each), model.make_cache()) for each in ids]))
    assert trace.layers == tuple(n for n in range(checkpoint.config.num_hidden_layers) if checkpoint.config.is_moe(n))
    assert len(routed) == len(trace.layers)
    for layer, expected in zip(trace.ids, routed, strict=True):
        assert (np.sort(layer, axis=1) == np.sort(expected, axis=1)).all()


def test_real_texts_of_the_trained_tiny_kimi_hit_as_the_reference_measured(tmp_path: Path) -> None:
    """Within .02 in 1,500 tokens of other texts; no policy that we have beats least recently used by much, or loses much."""
    random, texts, path = Random(0), tmp_path / "texts.jsonl", str(tmp_path / "trace.npz")
    made = [training_conversation(random) for _ in range(60)]
    texts.write_text("\n".join(json.dumps({"messages": each.messages, "tools": each.tools}) for each in made))
    run(["trace", "record", str(TRAINED), "--text", str(texts), "--tokens", "1500", "--dtype", "float32", "-o", path])
    trace = read_trace(path)
    assert (trace.experts, trace.chosen, len(trace.layers)) == (16, 4, 5)
    assert 0.30 <= trace.overlap() <= 0.40
    for slots, (lru, belady) in MEASURED.items():
        rate = replay(trace, "lru", slots).hit_rate
        assert rate == pytest.approx(lru, abs=0.02)
        assert replay(trace, "belady", slots).hit_rate == pytest.approx(belady, abs=0.02)
        for policy in POLICY_NAMES:
            assert replay(trace, policy, slots).hit_rate == pytest.approx(rate, abs=0.03), policy


def test_nothing_to_record_is_said(tmp_path: Path) -> None:
    directory = make_tiny(tmp_path / "tiny")
    with pytest.raises(UsageError, match="no text to record"):
        record(LayerWalk(checkpoint=Checkpoint(directory)), [])
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    for words, message in (
        (["--text", str(tmp_path / "none.txt"), "-o", str(tmp_path / "t.npz")], "cannot be read"),
        (["--text", str(empty), "-o", str(tmp_path / "t.npz")], "no text"),
        (["--text", str(empty), "-o", str(tmp_path / "no" / "t.npz")], "no such directory"),
    ):
        with pytest.raises(UsageError, match=message):
            run(["trace", "record", str(directory), *words])
