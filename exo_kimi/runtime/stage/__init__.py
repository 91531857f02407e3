"""One stage of a split model: its layers, resident in MLX; the worker that runs steps; its threads, sockets and process."""
