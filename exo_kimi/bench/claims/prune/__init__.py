"""What pruning the shipped tiny Kimi costs."""

from exo_kimi.bench.claims.prune.measure import main

__all__ = ["main"]
