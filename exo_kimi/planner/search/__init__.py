"""The search for the best split: cost laws, the exact solver, and what else could be done."""
