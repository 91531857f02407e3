"""What a checkpoint knows: held-out questions and tool requests, perplexity, distance to a reference, balance of the experts."""
