"""Bars on the terminal for weights that load and long prompts that are read."""

from __future__ import annotations

import asyncio
import logging

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from exo_kimi.runtime.requests import EngineSnapshot, TextEngine
from exo_kimi.units import format_bytes

log = logging.getLogger(__name__)

LOOK_INTERVAL_S = 0.25
LONG_PROMPT_TOKENS = 2048  # shorter prompts are read before a bar could be seen
LOG_STEP = 0.25


async def show_progress(engine: TextEngine, console: Console | None = None) -> None:
    """Watches until cancelled. On a terminal it draws bars that vanish when done; elsewhere it logs quarters of loading."""
    console = console or Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[detail]}"), TimeElapsedColumn())
    bars = _Bars(Progress(*columns, console=console, transient=True)) if console.is_terminal else _Lines()
    try:
        while True:
            bars.update(wanted_bars(engine.snapshot()))
            await asyncio.sleep(LOOK_INTERVAL_S)
    finally:
        bars.update({})


def wanted_bars(snapshot: EngineSnapshot) -> dict[str, tuple[float, str]]:
    """What is under way now: name -> (share done, detail)."""
    bars = {}
    for stage in snapshot.stages:
        if stage.state == "loading" and stage.total_bytes:
            detail = f"{format_bytes(stage.loaded_bytes)} of {format_bytes(stage.total_bytes)}"
            bars[f"stage {stage.stage} loading"] = (stage.loaded_bytes / stage.total_bytes, detail)
        elif stage.state == "warming":
            bars[f"stage {stage.stage} warming up"] = (1.0, "one pass of each kind, before the first request")
    for request in snapshot.requests:
        if request.state == "prefill" and request.prompt_tokens >= LONG_PROMPT_TOKENS:
            detail = f"{request.prompt_done} of {request.prompt_tokens} tokens"
            name = request.request_id.removeprefix("req_")[:8]
            bars[f"prompt {name}"] = (request.prompt_done / request.prompt_tokens, detail)
    return bars


class _Bars:
    """Bars on a terminal; the display runs only while there is one, so that it never fights with other output."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def update(self, wanted: dict[str, tuple[float, str]]) -> None:
        if wanted and not self._tasks:
            self._progress.start()
        for name in self._tasks.keys() - wanted.keys():
            self._progress.remove_task(self._tasks.pop(name))
        for name, (share, detail) in wanted.items():
            if name not in self._tasks:
                self._tasks[name] = self._progress.add_task(name, total=1.0, detail=detail)
            self._progress.update(self._tasks[name], completed=share, detail=detail)
        if not self._tasks:
            self._progress.stop()


class _Lines:
    """Log lines where there is no terminal."""

    def __init__(self) -> None:
        self._logged: dict[str, int] = {}

    def update(self, wanted: dict[str, tuple[float, str]]) -> None:
        self._logged = {name: step for name, step in self._logged.items() if name in wanted}
        for name, (share, detail) in wanted.items():
            step = int(share / LOG_STEP)
            if step > self._logged.get(name, -1):
                self._logged[name] = step
                log.info("%s: %.0f %% (%s)", name, share * 100, detail)
