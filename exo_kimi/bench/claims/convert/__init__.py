"""Converting a checkpoint beside `mlx_lm.convert`."""

from exo_kimi.bench.claims.convert.measure import main

__all__ = ["main"]
