"""A checkpoint directory on disk: headers, tensor names, packings, config files, their examination and repair."""
