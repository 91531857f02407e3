"""What the plugin's tests share: a fake exo, a clock that needs no waiting, and plans of a tiny Kimi for it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from exo_kimi.bench.setups.exo_here import ZENOH_PORT, find_exo
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.plugin.control.http import ExoClient
from exo_kimi.plugin.control.plan import exo_plan
from exo_kimi.plugin.control.watch import Timing

MODEL = "lab/kimi-k2-tiny"


def _sibling(name: str) -> ModuleType:
    """A module beside this file, under a name of its own: tests are no package."""
    full = f"plugin_tests_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None and spec.loader is not None
        module = sys.modules[full] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[full]


@dataclass
class Clock:
    """Time that passes only while somebody sleeps."""

    now: float = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    @property
    def timing(self) -> Timing:
        return Timing(clock=lambda: self.now, sleep=self.sleep)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven layers in 3, 4 and 6 bits, over four files."""
    return make_tiny(tmp_path_factory.mktemp("tiny") / "kimi", dtype="F32", shards=4)


@pytest.fixture(scope="session")
def fake_exo() -> ModuleType:
    """The module of the fake."""
    return _sibling("fake_exo")


@pytest.fixture(scope="session")
def real_exo() -> ModuleType:
    """The module that starts real nodes."""
    return importlib.import_module("exo_kimi.bench.setups.exo_nodes")


@pytest.fixture
def make_exo(fake_exo: ModuleType) -> Callable[..., Any]:
    """A fake cluster: a 512 GiB M3 Ultra and a 192 GiB M2 Ultra that both have the tiny Kimi."""

    def make(**options: Any) -> Any:
        studio = fake_exo.FakeNode(node_id="a" * 32, name="studio", ip="169.254.1.1", has={MODEL})
        mini = fake_exo.FakeNode(
            node_id="b" * 32,
            name="mini",
            ip="169.254.1.2",
            chip="Apple M2 Ultra",
            total_bytes=192 * fake_exo.GIB,
            free_bytes=171 * fake_exo.GIB,
            has={MODEL},
        )
        card = {
            "modelId": MODEL,
            "storageSize": {"inBytes": 8_360_064},
            "nLayers": 7,
            "hiddenSize": 256,
            "supportsTensor": True,
            "tasks": ["TextGeneration"],
            "backends": ["MlxMetal"],
        }
        options.setdefault("nodes", [studio, mini])
        options.setdefault("cards", {MODEL: card})
        return fake_exo.FakeExo(**options)

    return make


@pytest.fixture
def client_of() -> Callable[[Any], ExoClient]:
    """A client of a fake."""
    return lambda exo: ExoClient("http://studio:52415", transport=exo.transport)


@pytest.fixture
def plan_of(tiny: Path, client_of: Callable[[Any], ExoClient]) -> Callable[..., Any]:
    """A plan of the tiny Kimi for a fake's cluster, over the nodes by name: `mini` first, then `studio`."""

    def plan(exo: Any, split: tuple[int, ...] = (2, 5), **options: Any) -> Any:
        state = client_of(exo).state()
        options.setdefault("nodes", sorted(state.names.values())[: len(split)])
        return exo_plan(state, tiny, model_id=MODEL, context=4096, split=split, **options).plan

    return plan


@pytest.fixture(scope="module")
def exo_instance() -> Any:
    """Makes exo's BoundInstance of a rank, on loopback: `exo_instance(split, rank)`."""
    return _sibling("exo_shapes").Instances()


@pytest.fixture(scope="session")
def exo_shapes() -> ModuleType:
    """The module of exo's shapes."""
    return _sibling("exo_shapes")


@pytest.fixture(scope="session")
def lose_tensor() -> Callable[[Path, Path, str], None]:
    """Copies a checkpoint without one tensor."""
    copy: Callable[[Path, Path, str], None] = _sibling("exo_shapes").lose_tensor
    return copy


@pytest.fixture(scope="session")
def real_legacy() -> ModuleType:
    """The module that starts real nodes of legacy exo."""
    return _sibling("real_legacy")


@pytest.fixture(scope="session")
def legacy_models() -> ModuleType:
    """The module of checkpoints and oracles for legacy exo."""
    return _sibling("legacy_models")


@pytest.fixture(scope="session")
def legacy_plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan file for machines `node1` and `node2`, 5 and 2 layers, of any tiny Kimi of this shape."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan = _sibling("legacy_shapes").plan_of_shape()
    plan.save(path)
    return path


@pytest.fixture(scope="session")
def legacy_shapes() -> ModuleType:
    """The module of plans for legacy exo."""
    return _sibling("legacy_shapes")


@pytest.fixture(scope="session")
def fake_legacy() -> ModuleType:
    """The module of legacy exo's shapes."""
    return _sibling("fake_legacy")


@pytest.fixture(scope="session")
def exo_head() -> Any:
    """exo b5375f8ce that can be started here, or why it cannot."""
    return find_exo()


@pytest.fixture(scope="session")
def exo_71() -> Any:
    """exo v1.0.71 that can be started here, or why it cannot."""
    python = "EXO_71_PYTHON" if "EXO_71_PYTHON" in os.environ else "EXO_PYTHON"
    found = find_exo("EXO_71_SRC", python)
    if isinstance(found, str):
        return found
    arguments = ("--libp2p-port", str(ZENOH_PORT))
    standin = Path(__file__).with_name("standin71")
    return replace(found, arguments=arguments, paths=(standin, *found.paths))
