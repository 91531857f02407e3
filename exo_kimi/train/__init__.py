"""Training a small Kimi K2 from scratch: its texts, its tokenizer, forward and backward in NumPy, evaluation.

Why NumPy: MLX's Linux wheel multiplies with a reference BLAS, 2 to 4 GFLOP/s where NumPy's reaches 50 on the same core.
The model of `models/kimi_k2` under MLX's own gradients is the oracle of the tests.
"""
