"""A Kimi Linear converted: packed as mlx-lm packs it, its convolutions and decays carried, and read by both."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.compress.convert.conversion import make_conversion
from exo_kimi.compress.convert.run import convert
from exo_kimi.compress.prune.command import PruneOptions, prune
from exo_kimi.errors import UnsupportedModelError
from exo_kimi.planner.weights.bytes import bytes_of_recipe
from exo_kimi.planner.weights.recipes import load_recipe
from exo_kimi.runtime.loading.loader import load


def test_a_converted_kimi_linear_is_what_is_planned_and_what_mlx_lm_reads(tmp_path: Path) -> None:
    from mlx_lm.utils import load_model

    source = Checkpoint(make_tiny(tmp_path / "tiny", family="linear", layout="bf16", config={"num_experts": 8}))
    recipe, output = load_recipe("uniform-4"), tmp_path / "4-bit"
    convert(make_conversion(source, output, recipe))
    manifest = Checkpoint(output).manifest()
    assert manifest.disk_bytes == bytes_of_recipe(source.config, recipe, name="x").total_bytes
    routers = [entry.quant for entry in manifest.sources if entry.spec.kind == "router"]
    assert {(quant.bits, quant.group_size) for quant in routers if quant} == {(8, 64)}
    ours, (theirs, _) = load(output, dtype="float32"), load_model(output)
    theirs.set_dtype(mx.float32)
    ids = mx.array(np.arange(40))[None]
    found, expected = np.array(ours(ids)), np.array(theirs(ids))
    # But for the norm of latents: rms_norm_eps is 1e-5 here, which mlx-lm adds there too.
    assert np.abs(found - expected).max() <= 1e-3 * expected.std()


def test_pruning_one_is_refused_by_name(tmp_path: Path) -> None:
    directory = make_tiny(tmp_path / "tiny", family="linear", layout="bf16", config={"num_experts": 8})
    with pytest.raises(UnsupportedModelError, match="Kimi K2 alone"):
        prune(directory, tmp_path / "out", PruneOptions(), plan_file=False, say=lambda _: None)
