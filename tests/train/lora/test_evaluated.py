"""`eval --adapter`: asked and measured with the adapter; a call whose arguments are no JSON is a wrong call, not an end."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np

import exo_kimi
from exo_kimi.checkpoint.adapters.manifest import resolve_adapter
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.compress.layers import LayerWalk
from exo_kimi.models.blocks import Span
from exo_kimi.runtime.loading.adapters import adapt
from exo_kimi.train.evaluation.evaluate import _parsed, _with
from tests.runtime.adapters import write_random


def test_layers_that_are_loaded_one_by_one_have_the_adapter(base: Path, tmp_path: Path) -> None:
    adapter = resolve_adapter(write_random(tmp_path / "adapter", base, seed=1, kind="dora"), Checkpoint(base))
    whole = exo_kimi.load(base, dtype="float32")
    adapt(whole, adapter)
    tokens = mx.arange(12)
    walk = LayerWalk(checkpoint=Checkpoint(base), dtype="float32", change=_with(adapter))
    hidden = tokens
    for number in walk.numbers:
        model = walk.load(number)
        hidden = model.embed(hidden) if model.is_first else hidden
        hidden = model.layers[0](hidden, mx.arange(12), [Span(1, 12, "causal")], [None])
    expected = np.array(whole(tokens[None])[0])
    assert np.abs(np.array(model.logits(hidden)) - expected).max() < 1e-4 * expected.std()


def test_arguments_that_are_no_json_are_none() -> None:
    assert _parsed('{"city": "Oslo"}') == {"city": "Oslo"}
    assert _parsed('{"city": "Os') is None
