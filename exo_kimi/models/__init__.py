"""MLX maths of the models: attention, experts, caches, and Kimi K2 for any range of layers."""
