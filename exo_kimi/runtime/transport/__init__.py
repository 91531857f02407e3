"""Links between machines: addresses, keys, ZeroMQ sockets, and a small control channel."""
