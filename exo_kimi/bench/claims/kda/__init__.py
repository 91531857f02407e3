"""Kimi Delta Attention: memory and time of prefill, and primitives of a decode step, beside mlx-lm."""

from exo_kimi.bench.claims.kda.measure import main

__all__ = ["main"]
