"""Experts on disk: where each one lies, which of them a layer holds in its slots, and how they are read."""
