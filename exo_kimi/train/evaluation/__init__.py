"""Evaluation of a checkpoint: held-out questions, tool requests, perplexity, distance to a reference, balance of the experts."""
