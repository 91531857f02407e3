"""The loss curve as a picture; matplotlib comes with the extra `train`, and without it there is no picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

_WINDOW = 20


def draw_curve(losses: Sequence[float], path: Path) -> bool:
    """Write a PNG of the loss per step, with its running mean; False when matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4.5), dpi=120)
    axes = figure.subplots()
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, linewidth=0.6, alpha=0.35, label="loss of a step")
    if len(losses) > _WINDOW:
        mean = np.convolve(losses, np.ones(_WINDOW) / _WINDOW, mode="valid")
        axes.plot(steps[_WINDOW - 1 :], mean, linewidth=1.4, label=f"mean of {_WINDOW}")
    axes.set(xlabel="step", ylabel="nats a token of the assistant", yscale="log", title="Training of the tiny Kimi K2")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    return True
