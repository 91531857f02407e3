"""What users say of experts on disk: a profile for `pinned` among it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import UsageError
from exo_kimi.experts.budget import LayerProfile
from exo_kimi.experts.options import ExpertOptions
from exo_kimi.experts.traces.trace import ExpertTrace
from exo_kimi.runtime.cluster.cluster_plan import make_plan
from exo_kimi.runtime.protocol.frames import decode, encode
from exo_kimi.runtime.protocol.messages import Load


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(make_tiny(tmp_path_factory.mktemp("options") / "tiny"))


def traced(path: Path, checkpoint: Checkpoint, *, experts: int | None = None) -> Path:
    """Every token asks each layer for its own favourites: expert 3 always, and two others in turn."""
    config = checkpoint.config
    layers = [layer for layer in range(config.num_hidden_layers) if config.is_moe(layer)]
    tokens = np.array([[3, 5 if token % 3 else 1] for token in range(9)])
    ids = np.broadcast_to(tokens, (len(layers), *tokens.shape))
    ExpertTrace.of_tokens(ids, experts=experts or config.n_routed_experts, layers=layers).save(path)
    return path


def test_a_trace_is_the_profile_of_pinned_and_reaches_every_stage(tiny: Checkpoint, tmp_path: Path) -> None:
    options = ExpertOptions(budget_bytes=10**6, policy="pinned", profile=traced(tmp_path / "t.npz", tiny))
    cache = options.cache(tiny.config)
    assert cache.profile[0] == LayerProfile(layer=cache.profile[0].layer, experts=(3, 5, 1))
    plan = make_plan(tiny, stages=2, expert_cache=cache.sized(options.budget_bytes))
    asked = []
    for stage in plan.stages:
        load = decode([bytes(part) for part in encode(stage.load)])
        assert isinstance(load, Load)
        found = load.expert_cache()
        assert found is not None and found.policy == "pinned"
        asked += [each.layer for each in found.profile]
        assert {each.experts for each in found.profile} <= {(3, 5, 1)}
    assert asked == [each.layer for each in cache.profile]
    policy = cache.policy_of(cache.profile[0].layer, slots=4)
    for expert in (0, 3, 5, 7):
        policy.admit(expert)
    assert [policy.evict(()) for _ in range(4)] == [0, 7, 3, 5]


def test_mistakes_are_named(tiny: Checkpoint, tmp_path: Path) -> None:
    profile = traced(tmp_path / "t.npz", tiny)
    for options, message in (
        (ExpertOptions(policy="pinned"), "experts are pinned by a profile"),
        (ExpertOptions(policy="lru", profile=profile), "a profile is for the policy that pins"),
        (ExpertOptions(policy="fifo"), "no such policy"),
        (ExpertOptions(prefetch="sometimes"), "no such way of reading ahead"),
        (ExpertOptions(reads="mmap"), "no such way of reading experts"),
        (ExpertOptions(policy="pinned", profile=tmp_path / "none.npz"), "cannot read the trace"),
        (
            ExpertOptions(policy="pinned", profile=traced(tmp_path / "other.npz", tiny, experts=9)),
            "the profile is of another model",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            options.cache(tiny.config)
