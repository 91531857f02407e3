"""A draft head for a small Kimi, in NumPy: its rollout with gradients, its texts, its training and its acceptance."""
