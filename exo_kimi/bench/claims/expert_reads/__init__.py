"""Reads of experts: past the page cache and through it, from packed records and as published."""

from exo_kimi.bench.claims.expert_reads.measure import main

__all__ = ["main"]
