"""Loading: byte ranges of a checkpoint's files into the parameters of a stage, strictly."""
