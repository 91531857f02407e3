"""Decoding with a draft head beside decoding without."""

from exo_kimi.bench.claims.drafts.measure import main

__all__ = ["main"]
