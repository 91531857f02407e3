"""What one `exo-kimi serve` reads of a checkpoint: every header and config.json once, with a plan too."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exo_kimi.checkpoint import index
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import PlanInfeasibleError
from exo_kimi.planner.command import plan_answer
from exo_kimi.serve import launch
from exo_kimi.serve.launch import ServeOptions, serve

opened: list[Path] = []
watching = False


def hear(event: str, arguments: tuple[Any, ...]) -> None:
    """Note every file that this process opens; a hook cannot be taken away again, so it is told when to listen."""
    if watching and event == "open" and isinstance(arguments[0], str | bytes | Path):
        opened.append(Path(arguments[0].decode() if isinstance(arguments[0], bytes) else arguments[0]))


@pytest.fixture(scope="module", autouse=True)
def listen() -> None:
    sys.addaudithook(hear)


@pytest.mark.parametrize("planned", [True, False])
def test_headers_and_config_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planned: bool) -> None:
    """In this process, until the stages are ready; each stage process reads its own once more."""
    global watching
    directory = make_tiny(tmp_path / "tiny", shards=3)
    plan = tmp_path / "plan.json"
    plan_answer(directory=directory, cluster="2x m1-max-64", context=256).plan.save(plan)
    headers: Counter[str] = Counter()
    read_header = index.read_header

    def counted(path: Path) -> Any:
        headers[path.name] += 1
        return read_header(path)

    async def start(factory: Callable[[], Awaitable[Any]]) -> None:
        served = await factory()
        await served.engine.wait_ready()
        await served.engine.close()

    monkeypatch.setattr(index, "read_header", counted)
    monkeypatch.setattr(launch, "run", lambda factory, **_: asyncio.run(start(factory)))
    watching = True
    try:
        serve(ServeOptions(directory=directory, context=256, dtype="float32", plan=plan if planned else None))
    finally:
        watching = False
    times = Counter(path.name for path in opened if path.parent == directory)
    opened.clear()
    assert headers == {f"model-0000{number}-of-00003.safetensors": 1 for number in (1, 2, 3)}
    assert times["config.json"] == 1
    assert times["model.safetensors.index.json"] == 1


def test_a_plan_over_a_limit_is_refused_unless_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_tiny(tmp_path / "tiny")
    plan = plan_answer(directory=directory, cluster="2x m1-max-64", context=256).plan
    path = tmp_path / "plan.json"
    replace(plan, stages=(replace(plan.stages[0], headroom_bytes=-3), *plan.stages[1:])).save(path)
    started: list[object] = []
    monkeypatch.setattr(launch, "run", lambda factory, **_: started.append(factory))
    options = ServeOptions(directory=directory, dtype="float32", plan=path)
    with pytest.raises(PlanInfeasibleError, match=r"short by(.|\n)*\(3 bytes\)(.|\n)*plan.json(.|\n)*--force"):
        serve(options)
    assert not started
    serve(replace(options, force=True))
    assert started
