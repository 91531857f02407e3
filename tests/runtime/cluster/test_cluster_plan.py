"""Plans: who holds what where, every wrong option named before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import KeyMismatchError, SplitError, UsageError
from exo_kimi.experts.budget import ExpertCache
from exo_kimi.runtime.cluster.cluster_plan import make_plan
from exo_kimi.runtime.cluster.supervisor import ClusterOptions, StageCluster
from exo_kimi.runtime.transport.keys import ClusterKey


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("plan") / "tiny")


def test_a_plan_that_cannot_be_is_refused_before_anything_starts(tiny: Path) -> None:
    with pytest.raises(SplitError, match="sums to 8"):
        make_plan(Checkpoint(tiny), split="4,4")
    with pytest.raises(SplitError, match="1 to 7 stages"):
        make_plan(Checkpoint(tiny), stages=8)
    with pytest.raises(UsageError, match="disagree"):
        make_plan(Checkpoint(tiny), split="4,3", stages=3)
    with pytest.raises(UsageError, match="more --stage addresses"):
        make_plan(Checkpoint(tiny), stages=1, remotes=["127.0.0.1:5001", "127.0.0.1:5002"])
    with pytest.raises(UsageError, match="twice"):
        make_plan(Checkpoint(tiny), remotes=["127.0.0.1:5001", "127.0.0.1:5001"])
    with pytest.raises(KeyMismatchError, match="needs the cluster key"):
        make_plan(Checkpoint(tiny), remotes=["10.0.0.9:5001"])
    with pytest.raises(UsageError, match="no such context"):
        StageCluster(make_plan(Checkpoint(tiny)), ClusterOptions(context=10**9))


def test_a_plan_counts_remote_stages_and_puts_them_last(tiny: Path) -> None:
    plan = make_plan(Checkpoint(tiny), remotes=["127.0.0.1:5001"])
    assert [stage.remote and str(stage.remote) for stage in plan.stages] == [None, "127.0.0.1:5001"]
    assert [stage.remote for stage in make_plan(Checkpoint(tiny)).stages] == [None, None]


def test_without_a_number_there_is_one_stage_here_and_one_at_each_address(tiny: Path) -> None:
    plan = make_plan(Checkpoint(tiny), remotes=["127.0.0.1:5001", "127.0.0.1:5002"])
    assert [stage.remote is None for stage in plan.stages] == [True, False, False]


def test_a_stage_that_could_not_reach_the_next_one_is_refused(tiny: Path) -> None:
    key = ClusterKey.generate()
    with pytest.raises(UsageError, match="cannot reach the next one"):
        make_plan(Checkpoint(tiny), remotes=["10.0.0.9:5001", "127.0.0.1:5002"], key=key)


def test_the_fingerprint_is_of_the_weights_and_not_of_the_files(tiny: Path, tmp_path: Path) -> None:
    def fingerprints(directory: Path) -> list[str]:
        return [stage.load.fingerprint for stage in make_plan(Checkpoint(directory), stages=3).stages]

    same = make_tiny(tmp_path / "same", shards=1)
    other = make_tiny(tmp_path / "other", seed=7)
    assert fingerprints(same) == fingerprints(tiny)
    assert not set(fingerprints(other)) & set(fingerprints(tiny))


def test_an_expert_cache_is_shared_by_the_stages_of_this_machine(tiny: Path) -> None:
    checkpoint = Checkpoint(tiny)
    plan = make_plan(
        checkpoint, split="3,3,1", remotes=["127.0.0.1:5001"], expert_cache=ExpertCache(budget_bytes=10**6)
    )
    first, second, remote = plan.stages
    assert first.load.expert_cache_bytes is not None and second.load.expert_cache_bytes is not None
    # Layers 1:3 and 3:6 have experts.
    assert second.load.expert_cache_bytes == pytest.approx(1.5 * first.load.expert_cache_bytes, rel=0.1)
    assert 10**6 - 2 <= first.load.expert_cache_bytes + second.load.expert_cache_bytes <= 10**6
    assert remote.load.expert_cache_bytes is None
    # What it will take in memory: the leader's order, unless the stage was started with a budget of its own.
    assert first.bytes_with(None) == first.resident_bytes - first.expert_bytes + first.load.expert_cache_bytes
    assert remote.bytes_with(None) == remote.resident_bytes == remote.bytes_with(10**12)
    assert remote.bytes_with(1000) == remote.resident_bytes - remote.expert_bytes + 1000


def test_an_expert_cache_that_holds_no_expert_is_refused_before_anything_starts(tiny: Path) -> None:
    with pytest.raises(UsageError, match="expert cache is too small"):
        make_plan(Checkpoint(tiny), expert_cache=ExpertCache(budget_bytes=1000))


def test_an_expert_cache_for_all_experts_holds_all(tiny: Path) -> None:
    (stage,) = make_plan(Checkpoint(tiny), stages=1, expert_cache=ExpertCache(budget_bytes=10**12)).stages
    assert stage.load.expert_cache_bytes == stage.expert_bytes
