"""Options of our engine in a runner's environment, and exo v1.0.71's runner filled by our builder; without exo."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from exo_kimi.errors import UsageError
from exo_kimi.experts.budget import ExpertCache
from exo_kimi.plugin.runner import runner71
from exo_kimi.plugin.runner.builder import KimiBuilder
from exo_kimi.plugin.runner.engine import KimiEngine
from exo_kimi.plugin.runner.options import EngineOptions, expert_cache_of, expert_trace_of


@pytest.mark.parametrize(
    "options",
    [
        EngineOptions(),
        EngineOptions(context=4096),
        EngineOptions(kv_bytes=10**9),
        EngineOptions(draft=Path("/heads/k2"), draft_tokens=3),
    ],
)
def test_what_a_node_hands_on_is_what_a_runner_reads(options: EngineOptions) -> None:
    assert EngineOptions.from_environment(options.to_environment()) == options


def test_a_person_may_write_a_size_with_its_unit() -> None:
    assert EngineOptions.from_environment({"EXO_KIMI_KV_BYTES": "64 GB"}).kv_bytes == 64 * 10**9


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("EXO_KIMI_CONTEXT", "much"),
        ("EXO_KIMI_CONTEXT", "0"),
        ("EXO_KIMI_KV_BYTES", "lots"),
        ("EXO_KIMI_DRAFT_TOKENS", "7"),
    ],
)
def test_a_value_that_makes_no_sense_is_told_with_its_name(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=name) as told:
        EngineOptions.from_environment({name: value})
    assert value in str(told.value)


def test_nodes_of_one_machine_trace_into_a_file_each() -> None:
    given = {"EXO_KIMI_TRACE_EXPERTS": "/traces/chats.trace"}
    files = [expert_trace_of(stage, 2, given) for stage in (0, 1)]
    assert files == [Path("/traces/chats.stage-0.trace"), Path("/traces/chats.stage-1.trace")]
    assert expert_trace_of(0, 1, given) == Path("/traces/chats.trace")
    assert expert_trace_of(0, 1, {}) is None


def test_a_node_says_for_itself_how_many_experts_it_holds() -> None:
    assert expert_cache_of({}) is None
    assert expert_cache_of({"EXO_KIMI_EXPERT_CACHE": "60GB"}) == ExpertCache(budget_bytes=60 * 10**9)
    given = {"EXO_KIMI_EXPERT_CACHE": "60GB", "EXO_KIMI_EXPERT_POLICY": "lfu"}
    assert expert_cache_of(given) == ExpertCache(budget_bytes=60 * 10**9, policy="lfu")
    given = {**given, "EXO_KIMI_EXPERT_PREFETCH": "on", "EXO_KIMI_EXPERT_READS": "direct"}
    assert expert_cache_of(given) == ExpertCache(budget_bytes=60 * 10**9, policy="lfu", prefetch="on", reads="direct")
    for name in ("EXO_KIMI_EXPERT_PREFETCH", "EXO_KIMI_EXPERT_READS"):
        with pytest.raises(UsageError, match="no such way of reading"):
            expert_cache_of({**given, name: "sometimes"})
    for name, value in (("EXO_KIMI_EXPERT_CACHE", "lots"), ("EXO_KIMI_EXPERT_POLICY", "mru")):
        with pytest.raises(UsageError) as told:
            expert_cache_of(given | {name: value})
        assert value in str(told.value)


def test_a_runner_of_v1_0_71_fills_and_builds_our_builder(monkeypatch: pytest.MonkeyPatch, exo_shapes: Any) -> None:
    class InferenceGenerator(ABC):
        """As exo's."""

        @abstractmethod
        def step(self) -> None: ...

    runner = ModuleType("exo.worker.runner.llm_inference.runner")
    vars(runner).update(InferenceGenerator=InferenceGenerator, Builder=None, initialize_mlx=None, load_mlx_items=None)
    for name in ("exo", "exo.worker", "exo.worker.runner", "exo.worker.runner.llm_inference"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, runner.__name__, runner)
    monkeypatch.setattr(runner71.FilledBuilder, "latest", None)
    monkeypatch.setattr("exo_kimi.plugin.runner.chunks.ExoTypes.installed", exo_shapes.exo_types)
    did: list[str] = []
    monkeypatch.setattr(KimiBuilder, "connect", lambda self, bound: did.append(f"connect {bound}"))
    monkeypatch.setattr(KimiBuilder, "load", lambda self, bound: iter([SimpleNamespace(layers_loaded=1, total=1)]))

    runner71.put_in()
    calls: Any = runner  # what the runner's own code does with its names
    builder = calls.Builder("model", None, None)
    assert isinstance(builder, calls.Builder) and builder.group is None
    builder.group = calls.initialize_mlx("instance")
    assert builder.group is not None and did == ["connect instance"]
    loading = calls.load_mlx_items("instance", builder.group)
    assert next(loading).layers_loaded == 1
    with pytest.raises(StopIteration) as ended:
        next(loading)
    builder.inference_model, builder.tokenizer, builder.vision_processor = ended.value.value
    assert issubclass(KimiEngine, InferenceGenerator)
