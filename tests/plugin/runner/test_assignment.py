"""What a runner reads from exo's instance, and how it turns tasks into sequences and tokens into chunks."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import resolve
from exo_kimi.errors import ExoPlacementError, KeyMismatchError, UsageError
from exo_kimi.plugin.runner.assignment import key_of, node_layers_of, not_ours, with_address
from exo_kimi.plugin.runner.leader import cluster_plan
from exo_kimi.runtime.transport.address import Address
from exo_kimi.runtime.transport.keys import ClusterKey


def test_every_rank_knows_its_layers_and_where_to_meet(exo_shapes: ModuleType) -> None:
    first, second = (node_layers_of(exo_shapes.bound_instance((5, 2), rank)) for rank in (0, 1))
    assert (first.start_layer, first.end_layer, second.start_layer, second.end_layer) == (0, 5, 5, 7)
    assert [str(address) for address in first.seen] == ["127.0.0.2:50000"]
    assert str(second.listen) == "127.0.0.2:50000"
    assert str(second.leader) == str(first.listen) == "127.0.0.1:50000"
    assert first.leader is None and second.seen == ()


def test_on_rdma_rank_0_is_where_exos_coordinator_would_be_and_the_other_says_where_it_is(
    exo_shapes: ModuleType,
) -> None:
    bound = [exo_shapes.bound_instance((5, 2), rank, kind=exo_shapes.MlxJacclInstance) for rank in (0, 1)]
    first, second = map(node_layers_of, bound)
    assert (str(first.listen), first.rdma_device, first.seen) == ("0.0.0.0:50000", "rdma_en1", ())
    assert (str(second.leader), str(second.listen)) == ("127.0.0.1:50000", "0.0.0.0:0")
    assert (second.rdma_device, second.neighbours) == ("rdma_en0", ((0, "127.0.0.1"),))
    told = Address("127.0.0.2", 7)
    assert with_address(first, told).seen == with_address(first, told).from_previous == (told,)
    bound[1].instance.jaccl_devices[1][0] = None
    with pytest.raises(ExoPlacementError, match="names no device"):
        node_layers_of(bound[1])


def test_a_rank_listens_only_where_others_see_it_unless_they_differ(exo_shapes: ModuleType) -> None:
    bound = exo_shapes.bound_instance((3, 2, 2), 1)
    assert str(node_layers_of(bound).listen) == "127.0.0.2:50000"
    bound.instance.hosts_by_node["node2"][1].ip = "10.0.0.7"
    assert str(node_layers_of(bound).listen) == "0.0.0.0:50000"


def test_a_rank_is_reached_by_the_one_before_over_their_own_cable(
    exo_shapes: ModuleType, tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    bound = exo_shapes.bound_instance((3, 2, 2), 0)
    bound.instance.hosts_by_node["node1"][2].ip = "10.0.0.7"
    own_layers = node_layers_of(bound)
    key = key_of(own_layers, environment_text=None)
    plan = cluster_plan(own_layers, resolve(open_index(tiny), 0, 3), Address("", 0, "/own"), key)
    assert [str(stage.remote) for stage in plan.stages] == ["ipc:///own", "127.0.0.2:50000", "127.0.0.3:50000"]
    assert [str(stage.from_previous) for stage in plan.stages[1:]] == ["127.0.0.2:50000", "10.0.0.7:50000"]
    assert [(stage.load.start_layer, stage.load.end_layer) for stage in plan.stages] == [(0, 3), (3, 5), (5, 7)]


def test_a_rank_that_is_no_neighbour_is_found_through_one_that_is(exo_shapes: ModuleType) -> None:
    own_layers = node_layers_of(exo_shapes.bound_instance((2, 2, 2, 1), 0))
    assert [str(address) for address in own_layers.seen] == ["127.0.0.2:50000", "127.0.0.3:50000", "127.0.0.4:50000"]


def test_every_rank_takes_the_context_of_the_placed_instance(exo_shapes: ModuleType) -> None:
    for rank in (0, 1):
        assert node_layers_of(exo_shapes.bound_instance((5, 2), rank, context=4096)).context == 4096
        assert node_layers_of(exo_shapes.bound_instance((5, 2), rank)).context is None  # exo's 0: unknown


def test_an_instance_alone_needs_no_address(exo_shapes: ModuleType) -> None:
    own_layers = node_layers_of(exo_shapes.bound_instance((7,), 0))
    assert (own_layers.stages, own_layers.listen, own_layers.seen) == (1, None, ())


@pytest.mark.parametrize(
    "ranges", [[(0, 4), (5, 7)], [(0, 5), (4, 7)], [(0, 5), (5, 6)], [(5, 7), (0, 5)], [(0, 7), (7, 7)]]
)
def test_layers_that_are_not_each_on_one_rank_in_order_are_refused(exo_shapes: ModuleType, ranges: Any) -> None:
    with pytest.raises(ExoPlacementError, match="every layer exactly once"):
        node_layers_of(exo_shapes.bound_instance((5, 2), 0, ranges=ranges))


def test_a_rank_that_nobody_sees_is_refused(exo_shapes: ModuleType) -> None:
    with pytest.raises(ExoPlacementError, match="no address of rank 1"):
        node_layers_of(exo_shapes.bound_instance((5, 2), 0, ips=("127.0.0.1", "198.51.100.9")))


def test_all_ranks_of_an_instance_have_one_key_and_other_instances_another(
    exo_shapes: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = [
        key_of(node_layers_of(exo_shapes.bound_instance((5, 2), rank, instance_id=instance)), environment_text=None)
        for rank, instance in ((0, "one"), (1, "one"), (1, "two"))
    ]
    assert keys[0] == keys[1] != keys[2]
    assert keys[0].for_loopback(True) is keys[0]


def test_a_key_of_the_users_own_goes_first(exo_shapes: ModuleType) -> None:
    own_layers = node_layers_of(exo_shapes.bound_instance((5, 2), 1))
    own = ClusterKey.generate()
    assert key_of(own_layers, environment_text=own.secret.decode()) == own
    with pytest.raises((UsageError, KeyMismatchError)):
        key_of(own_layers, environment_text="too short")


def test_what_is_not_a_kimi_over_tcp_by_layers_is_left_to_exo(
    exo_shapes: ModuleType, tiny: Path, tmp_path: Path
) -> None:
    make = exo_shapes.bound_instance
    assert not_ours(make((5, 2), 0), tiny) is None
    assert not_ours(make((5, 2), 0), None) is None  # the files are still to come
    assert not_ours(make((5, 2), 0, family="", model_id="moonshotai/Kimi-K2-Instruct"), None) is None
    assert "not a Kimi" in str(not_ours(make((5, 2), 0, family="llama", model_id="lab/llama"), tiny))
    assert "tensor" in str(not_ours(make((5, 2), 0, shard=exo_shapes.TensorShardMetadata), tiny))
    assert not_ours(make((5, 2), 0, kind=exo_shapes.MlxJacclInstance), tiny) is None
    assert "RDMA" in str(not_ours(make((3, 2, 2), 0, kind=exo_shapes.MlxJacclInstance), tiny))
    tensor = make((5, 2), 0, kind=exo_shapes.MlxJacclInstance, shard=exo_shapes.TensorShardMetadata)
    assert "tensor" in str(not_ours(tensor, tiny))
    (tmp_path / "config.json").write_text('{"model_type": "kimi_linear"}')
    assert not_ours(make((5, 2), 0), tmp_path) is not None
