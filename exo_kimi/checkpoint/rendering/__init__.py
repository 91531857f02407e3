"""Chat templates of a checkpoint, rendered in processes with limits of time and memory: they are somebody else's programs."""
