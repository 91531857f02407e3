"""`exo-kimi inspect` and `exo-kimi doctor`: what is in a checkpoint directory, what is wrong with it, and repairs."""
