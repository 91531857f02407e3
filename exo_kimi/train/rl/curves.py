"""The curves of a GRPO training as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from exo_kimi.train.rl.trainer import GrpoProgress

_PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("reward and right answers", ("reward", "right", "focus_right")),
    ("groups", ("mixed", "all_right", "all_wrong")),
    ("nats a token", ("kl", "entropy", "difference")),
    ("shares of tokens", ("clipped", "capped", "truncated")),
    ("tokens of a completion", ("length",)),
    ("processor seconds of a step", ("process_s",)),
)


def draw_curves(history: Sequence[GrpoProgress], path: Path) -> bool:
    """Write a PNG of every figure by step; False when matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(11, 9), dpi=110)
    steps = [each.step for each in history]
    for axes, (title, names) in zip(figure.subplots(3, 2).flat, _PANELS, strict=True):
        for name in names:
            axes.plot(steps, [getattr(each, name) for each in history], linewidth=1.1, label=name.replace("_", " "))
        axes.set(xlabel="step", title=title)
        axes.grid(visible=True, alpha=0.25)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    return True
