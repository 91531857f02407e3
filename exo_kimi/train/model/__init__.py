"""The small model in NumPy: its parameters, and every layer with its gradient."""
