"""A draft head with other bits is the same head, smaller; from any layout, and back through the strict loader."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.drafts.manifest import resolve_draft
from exo_kimi.checkpoint.tiny.draft import make_tiny_draft
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.compress.convert.command import ConvertOptions, run_convert
from exo_kimi.errors import UsageError
from exo_kimi.planner.weights.draft import draft_bytes
from exo_kimi.planner.weights.recipes import load_recipe
from exo_kimi.runtime.loading.draft import load_draft_head

DATA = Path(str(files("exo_kimi").joinpath("data")))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(make_tiny(tmp_path_factory.mktemp("target")))


def options(head: Path, output: Path, recipe: str, **more: Any) -> ConvertOptions:
    return ConvertOptions(directory=head, output=output, recipe=load_recipe(recipe), **more)


@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_a_converted_head_says_nearly_the_same(tmp_path: Path, target: Checkpoint, kind: Any) -> None:
    source = make_tiny_draft(tmp_path / "head", target.config, kind=kind, version="3.1", draft_vocab_size=64)
    told = run_convert(options(source, tmp_path / "out", "uniform-8"))
    assert "8-bit" in told
    manifest = resolve_draft(tmp_path / "out")
    assert all(each.quant is not None and each.quant.bits == 8 for each in manifest.sources if each.spec.quantizable)
    assert not any("the shapes are followed" in note for note in manifest.notes)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert np.array_equal(before["d2t"], after["d2t"]) and np.array_equal(before["t2d"], after["t2d"])
    heads = [load_draft_head(each, target, dtype="float32") for each in (source, tmp_path / "out")]
    rows = mx.random.normal((5, 3 * target.config.hidden_size))
    one, other = (head.logits(head(mx.arange(5), head.fuse(rows), [(5, head.make_cache())])) for head in heads)
    assert (mx.abs(one - other).max() / mx.abs(one).max()).item() < 0.05
    assert (
        draft_bytes(tmp_path / "out", target.config).resident_bytes < draft_bytes(source, target.config).resident_bytes
    )


def test_bits_that_stay_are_moved_and_plain_ones_come_back(tmp_path: Path, target: Checkpoint) -> None:
    source = DATA / "tiny-kimi-k2-draft"
    run_convert(options(source, tmp_path / "same", "uniform-4"))
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "same" / "model.safetensors")
    assert np.array_equal(before["midlayer.mlp.up_proj.weight"], after["layers.0.mlp.up_proj.weight"])
    run_convert(options(source, tmp_path / "plain", "bf16"))
    assert not any(each.quant for each in resolve_draft(tmp_path / "plain").sources)
    assert resolve_draft(tmp_path / "plain").config.target_fingerprint is not None


def test_what_a_head_does_not_have_is_refused_and_a_dry_run_writes_nothing(tmp_path: Path, target: Checkpoint) -> None:
    source = make_tiny_draft(tmp_path / "head", target.config)
    assert "modules" in run_convert(options(source, tmp_path / "out", "uniform-4", dry_run=True))
    assert not (tmp_path / "out").exists()
    for more in ({"layers": (0, 1)}, {"keep_kv_b": True}):
        with pytest.raises(UsageError, match="converted whole"):
            run_convert(options(source, tmp_path / "out", "uniform-4", **more))
    run_convert(options(source, tmp_path / "out", "uniform-4"))
    with pytest.raises(UsageError, match="output exists"):
        run_convert(options(source, tmp_path / "out", "uniform-4"))
