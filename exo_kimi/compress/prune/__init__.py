"""Pruning: experts, and layers for research, taken out by copying packed bytes."""
