"""Our engine inside exo 1.x: what one of its runner processes builds, loads, runs and tells, for Kimi models."""
