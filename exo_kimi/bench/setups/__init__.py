"""What the claims share: peers, stages, checkpoints and traffic to measure with."""
