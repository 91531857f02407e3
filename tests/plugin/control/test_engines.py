"""Which engine each node has: asked, told by the status, and a plan for ours refused by the name of the node that lacks it."""

from __future__ import annotations

import time
from typing import Any

import pytest

from exo_kimi.errors import ExoLoadError, ExoPlacementError
from exo_kimi.plugin.control.apply import apply_plan
from exo_kimi.plugin.control.engines import ask_engines
from exo_kimi.plugin.control.texts import status_text

STUDIO, MINI = "a" * 32, "b" * 32


def _refused(exo: Any, client_of: Any, plan_of: Any, **options: Any) -> str:
    with pytest.raises(ExoPlacementError) as refused:
        apply_plan(client_of(exo), plan_of(exo, our_engine=True), model_id="lab/kimi-k2-tiny", **options)
    assert not exo.posted
    return str(refused.value)


def test_a_node_without_our_engine_is_named_before_anything_is_placed(
    make_exo: Any, client_of: Any, plan_of: Any
) -> None:
    exo = make_exo()
    exo.nodes[1].version = None
    began = time.monotonic()
    told = _refused(exo, client_of, plan_of)
    assert "mini does not run exo-kimi's engine" in told and "exo-kimi exo run" in told
    assert time.monotonic() - began < 10


def test_the_node_that_is_asked_may_be_the_one_without(make_exo: Any, client_of: Any, plan_of: Any) -> None:
    exo = make_exo()
    exo.nodes[0].version = None
    assert "studio does not run exo-kimi's engine" in _refused(exo, client_of, plan_of)


def test_unequal_versions_are_refused_by_name(make_exo: Any, client_of: Any, plan_of: Any) -> None:
    exo = make_exo()
    exo.nodes[1].version = "0.4.0"
    told = _refused(exo, client_of, plan_of)
    assert "different versions" in told and "studio: 0.3.0" in told and "mini: 0.4.0" in told


def test_nodes_of_other_plans_are_not_asked_for_our_engine(
    make_exo: Any, client_of: Any, plan_of: Any, clock: Any
) -> None:
    bare = make_exo()
    for node in bare.nodes:
        node.version = None
    assert apply_plan(client_of(bare), plan_of(bare), model_id="lab/kimi-k2-tiny", timing=clock.timing).answer
    one = make_exo()
    one.nodes[1].version = None
    plan = plan_of(one, (7,), nodes=["studio"], our_engine=True)
    assert apply_plan(client_of(one), plan, model_id="lab/kimi-k2-tiny", timing=clock.timing).answer


def test_a_node_that_does_not_answer_may_have_it(make_exo: Any, client_of: Any, plan_of: Any, clock: Any) -> None:
    exo = make_exo()
    exo.nodes[1].answers = False
    plan = plan_of(exo, our_engine=True)
    assert apply_plan(client_of(exo), plan, model_id="lab/kimi-k2-tiny", timing=clock.timing).answer


def test_the_status_tells_version_and_engine_of_each_node_and_whose_engine_serves(
    make_exo: Any, client_of: Any, plan_of: Any, clock: Any
) -> None:
    exo, report = make_exo(), {"pid": 1, "model_id": "lab/kimi-k2-tiny", "beat": 3}
    client = client_of(exo)
    placed = apply_plan(client, plan_of(exo), model_id="lab/kimi-k2-tiny", timing=clock.timing)
    ranks = {each.node_id: rank for rank, each in enumerate(placed.assignments)}
    of_instance = report | {"instance_id": placed.instance_id}
    silent = "rank 1 (169.254.1.2:50000) is stalled, silent for 7 s"
    exo.reports = [
        of_instance
        | {"node_id": STUDIO, "rank": ranks[STUDIO], "engine": "exo-kimi", "why": None, "waits_for": silent},
        of_instance
        | {"node_id": MINI, "rank": ranks[MINI], "engine": "exo", "why": "not a Kimi K2", "waits_for": None},
    ]
    exo.nodes[1].version = "0.4.0"
    state = client.state()
    text = status_text(state, where="here", engines=ask_engines(client, state))
    assert "480.00 GiB free  exo-kimi 0.3.0, mlx 0.32.0\n" in text
    assert "171.00 GiB free  exo-kimi 0.4.0, mlx 0.32.0\n" in text
    assert f"Ready  exo-kimi's engine  {silent}\n" in text
    assert "Ready  exo's engine (not a Kimi K2)\n" in text


def test_the_status_tells_a_bare_node_and_one_that_is_frozen(make_exo: Any, client_of: Any) -> None:
    exo = make_exo()
    exo.nodes[0].version, exo.nodes[1].answers = None, False
    client = client_of(exo)
    state = client.state()
    text = status_text(state, where="here", engines=ask_engines(client, state))
    assert "exo's own engine only (not started by `exo-kimi exo run`)" in text
    assert "171.00 GiB free  does not answer\n" in text


def test_a_runner_that_refuses_a_node_by_its_id_is_told_by_its_name(
    make_exo: Any, client_of: Any, plan_of: Any, clock: Any
) -> None:
    """Placed by another door, the runners themselves notice."""
    exo = make_exo(fails={STUDIO: f"{MINI} does not run exo-kimi's engine"})
    with pytest.raises(ExoLoadError, match="mini does not run exo-kimi's engine"):
        apply_plan(client_of(exo), plan_of(exo), model_id="lab/kimi-k2-tiny", timing=clock.timing)
