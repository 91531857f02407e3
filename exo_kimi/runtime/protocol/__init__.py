"""What the leader and the stages say to each other: messages, steps and results as frames of bytes, strict against any others."""
