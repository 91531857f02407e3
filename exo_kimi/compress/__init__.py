"""Other checkpoints from one that is too large: converted to other bits, pruned, calibrated, compared."""
