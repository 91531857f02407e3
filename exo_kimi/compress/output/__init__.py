"""A checkpoint directory written a tensor at a time: sizes first, then bytes, resumable at every moment."""
