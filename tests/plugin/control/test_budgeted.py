"""A checkpoint whose layers have different numbers of experts, in exo: our engine's, and nobody else's."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import ExoPlacementError, UsageError
from exo_kimi.planner.weights.bytes import bytes_of_manifest
from exo_kimi.plugin.control.plan import exo_plan
from exo_kimi.plugin.control.prepare import prepare
from exo_kimi.plugin.runner.assignment import check_placement, not_ours

COUNTS = [0, 12, 6, 16, 16, 8, 16]


def test_exos_own_engine_gets_no_plan_and_no_instance_of_it(
    tmp_path: Path, make_exo: Any, client_of: Any, exo_shapes: ModuleType
) -> None:
    uneven = make_tiny(tmp_path / "uneven", config={"n_routed_experts_per_layer": COUNTS})
    state = client_of(make_exo()).state()
    with pytest.raises(UsageError, match="run on exo-kimi's engine alone"):
        exo_plan(state, uneven, model_id="lab/kimi-k2-tiny", context=4096)
    plan = exo_plan(state, uneven, model_id="lab/kimi-k2-tiny", context=4096, split=(3, 4), our_engine=True)
    total = bytes_of_manifest(Checkpoint(uneven).manifest())
    assert sum(stage.weight_bytes for stage in plan.plan.stages) == total.total_bytes + sum(total.widened_bytes)
    assert plan.tensor is None
    notes = prepare(uneven, tmp_path / "models", model_id="lab/kimi-k2-tiny").notes
    assert any("exo-kimi's engine alone" in note for note in notes)
    tensor = exo_shapes.bound_instance((5, 2), 0, shard=exo_shapes.TensorShardMetadata)
    assert not_ours(exo_shapes.bound_instance((5, 2), 0), uneven) is None
    assert not_ours(tensor, uneven) is None  # ours, to be refused by name
    with pytest.raises(ExoPlacementError, match="placed with tensor parallelism"):
        check_placement(tensor)
