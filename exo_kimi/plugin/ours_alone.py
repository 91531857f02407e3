"""Models that exo's own engine cannot run, and why."""

from __future__ import annotations

from exo_kimi.arch.config import KimiConfig


def runs_on_ours_alone(config: KimiConfig) -> str | None:
    """What of a model exo's own engine does not know; None where it runs it too.

    Source: exo `worker/engines/mlx/auto_parallel.py` at b5375f8ce, which cuts mlx-lm's deepseek_v3, deepseek_v32 and kimi_k25.
    """
    if config.has_states:
        return "layers with Kimi Delta Attention"
    return None if config.is_even else "layers with different numbers of experts"
