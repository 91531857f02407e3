"""A training that can stop and go on as if it had not: its state in one file, and its bar in the terminal."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from exo_kimi.errors import UsageError
from exo_kimi.train.model.layers import Parameters
from exo_kimi.train.optimizers import Optimizer


class ResumableTraining:
    """What a trainer of any model saves: its steps, losses and parameters, and its optimizer's state."""

    step: int
    losses: list[float]
    parameters: Parameters
    _optimizer: Optimizer

    def save(self, path: Path) -> None:
        """Write everything that `resume` needs; the old file is replaced only by a whole one."""
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {f"parameter {name}": value for name, value in self.parameters.items()}
        arrays.update(self._optimizer.state)
        arrays.update(self._more_state())
        np.savez(buffer, step=self.step, losses=np.array(self.losses), **arrays)
        partial = path.with_suffix(".partial")
        partial.write_bytes(buffer.getbuffer())
        partial.replace(path)

    def resume(self, path: Path) -> None:
        """Go back to a saved step; the steps that follow are those that would have followed."""
        with np.load(path) as saved:
            self.step, self.losses = int(saved["step"]), saved["losses"].tolist()
            for name, value in self.parameters.items():
                value[...] = saved[f"parameter {name}"]
            for name, value in self._optimizer.state.items():
                value[...] = saved[name]
            self._take_more_state(saved)

    def _more_state(self) -> dict[str, Any]:
        """Arrays of a trainer's own, by name."""
        return {}

    def _take_more_state(self, saved: Mapping[str, Any]) -> None:
        """Take back what `_more_state` gave."""


def claim_output(output: Path, stated: str, *, of: str) -> None:
    """Make a training's directory and write in it what determines its steps, or find that there.

    Args:
        output: the directory.
        stated: a line.
        of: what it states, in words.

    Raises:
        UsageError: another training is there.
        OSError: it cannot be written.
    """
    path = output / "recipe.txt"
    output.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.read_text(encoding="utf-8") != stated:
        raise UsageError(
            f"the directory holds a training of another {of}",
            expected=stated.strip(),
            found=path.read_text(encoding="utf-8").strip(),
            where=path,
            fix="give another directory, or the same options",
        )
    path.write_text(stated, encoding="utf-8")


@contextmanager
def training_bar(*, steps: int, step: int) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on standard error; what it gives is called with the step done, its tokens, and what to say of it."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[told]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=steps, completed=step, told="")
        began_s, tokens = time.monotonic(), 0

        def tell(step: int, step_tokens: int, told: str) -> None:
            nonlocal tokens
            tokens += step_tokens
            rate = tokens / (time.monotonic() - began_s)
            bar.update(task, completed=step, told=f"{told}, {rate:.0f} tokens/s")

        yield tell
