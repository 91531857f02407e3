"""Bytes of models: published ones by name, recipes of bits, and checkpoints from their headers."""
