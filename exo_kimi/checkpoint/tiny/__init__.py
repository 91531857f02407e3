"""Tiny Kimi checkpoints in every published layout, made for tests, demos and benchmarks."""
