"""An adapter put into the weights: it says what the adapter beside the base says, and nothing else changes by a byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import exo_kimi
from exo_kimi.checkpoint.adapters.manifest import resolve_adapter
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.compress.convert.command import ConvertOptions, run_convert
from exo_kimi.compress.convert.fuse import fuse, plan_fusion
from exo_kimi.compress.ranges import RangeReader
from exo_kimi.errors import UsageError
from exo_kimi.planner.weights.recipes import load_recipe
from exo_kimi.runtime.loading.adapters import adapt
from tests.runtime.adapters import write_random
from tests.train.lora.conftest import SHAPE

LAYOUTS: dict[str, dict[str, Any]] = {
    "bf16": {"layout": "bf16"},
    "float32": {"layout": "bf16", "dtype": "F32"},
    "fp8": {"layout": "fp8"},
    "int4": {"layout": "int4"},
    "mlx": {"layout": "mlx", "group_size": 32},
    "absorbed": {"layout": "mlx", "absorbed": True, "group_size": 32},
}
WORST = {"bf16": 0.005, "float32": 1e-6, "fp8": 0.05, "int4": 0.005, "mlx": 0.12, "absorbed": 0.12}


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_layout_takes_an_adapter_in_and_keeps_all_else(tmp_path: Path, layout: str, kind: str) -> None:
    if kind == "dora" and layout not in ("float32", "mlx"):
        pytest.skip("the arithmetic is the same")
    base = make_tiny(tmp_path / "base", config=SHAPE, shards=2, **LAYOUTS[layout])
    adapter = resolve_adapter(write_random(tmp_path / "adapter", base, seed=4, kind=kind), Checkpoint(base))
    written, modules = fuse(plan_fusion(Checkpoint(base), adapter.directory, tmp_path / "fused"))
    assert len(modules) == len(adapter.modules) and written.files >= 2
    assert max(module.error for module in modules) < WORST[layout] < min(module.change for module in modules)
    changed = changed_tensors(base, tmp_path / "fused")
    adapted = {module.spec.path for module in adapter.modules}
    for name in changed:
        assert any(name.rpartition(".")[0].endswith(path) for path in adapted), name
    assert len({name.rpartition(".")[0] for name in changed}) == len(adapted)
    assert (tmp_path / "fused" / "config.json").read_text() == (base / "config.json").read_text()

    tokens = mx.array(np.arange(20, dtype=np.int32))[None]
    beside = exo_kimi.load(base, dtype="float32")
    plain = np.array(beside(tokens))
    adapt(beside, adapter)
    expected = np.array(beside(tokens))
    found = np.array(exo_kimi.load(tmp_path / "fused", dtype="float32")(tokens))
    bound = 1e-4 if layout == "float32" else 3 * WORST[layout]
    assert np.abs(found - expected).mean() < bound * np.abs(expected).mean() * 3
    assert np.abs(found - expected).mean() < 0.5 * np.abs(plain - expected).mean()


def changed_tensors(one: Path, other: Path) -> set[str]:
    """Names of tensors whose bytes, dtype or shape differ; both have the same names in the same files."""
    first, second = Checkpoint(one), Checkpoint(other)
    assert first.index.tensors.keys() == second.index.tensors.keys()
    changed = set()
    with RangeReader(one) as before, RangeReader(other) as after:
        for name, entry in first.index.tensors.items():
            there = second.index.tensors[name]
            assert (there.dtype, there.shape, there.file) == (entry.dtype, entry.shape, entry.file)
            if not np.array_equal(before.read(entry), after.read(there)):
                changed.add(name)
    return changed


def test_a_second_run_changes_nothing_and_others_are_refused(tmp_path: Path) -> None:
    base = make_tiny(tmp_path / "base", layout="bf16", config=SHAPE, shards=1)
    adapter = write_random(tmp_path / "adapter", base, seed=4)
    options = {"directory": base, "output": tmp_path / "fused", "recipe": None, "adapter": adapter}
    told = run_convert(ConvertOptions(**options))
    assert "11 modules have the adapter in them, every other tensor is the source's" in told
    assert "nothing was changed" in run_convert(ConvertOptions(**options))
    with pytest.raises(UsageError, match=r"(?s)contradict each other.*put the adapter in first"):
        run_convert(ConvertOptions(**{**options, "recipe": load_recipe("uniform-8")}))
    with pytest.raises(UsageError, match="the output is the source"):
        run_convert(ConvertOptions(**{**options, "output": base}))


def test_a_change_that_the_bits_cannot_hold_is_told(tmp_path: Path) -> None:
    """An adapter that does next to nothing, on a base of few bits."""
    base = make_tiny(tmp_path / "base", layout="mlx", config=SHAPE, shards=1, group_size=32)
    adapter = write_random(tmp_path / "adapter", base, seed=4)
    file = adapter / "adapter_config.json"
    file.write_text(file.read_text().replace('"scale": 1.5', '"scale": 0.001'))
    told = run_convert(ConvertOptions(directory=base, output=tmp_path / "fused", recipe=None, adapter=adapter))
    assert "change by less than their bits can hold" in told
