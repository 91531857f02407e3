"""A small checkpoint in several files, the hub's stand-in, and a machine of its own for caches and models."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from exo_kimi.checkpoint.tiny.make import make_tiny

sys.path.insert(0, str(Path(__file__).parent))
from hub_stand_in import HubStandIn, hub_stand_in

Hub = Callable[..., HubStandIn]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of seven layers in five files, most of them with two layers."""
    return make_tiny(tmp_path_factory.mktemp("whole") / "kimi", shards=5)


@pytest.fixture
def hub() -> Iterator[Hub]:
    """Start stand-ins that end with the test."""
    with ExitStack() as stack:

        def start(files: Any, **settings: Any) -> HubStandIn:
            return stack.enter_context(hub_stand_in(files, **settings))

        yield start


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Caches and models of a test are its own."""
    for name, folder in (("XDG_CACHE_HOME", "cache"), ("XDG_DATA_HOME", "data"), ("HF_HOME", "hf"), ("HOME", "home")):
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.delenv("EXO_KIMI_MODELS", raising=False)
    return tmp_path
