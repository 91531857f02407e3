"""What a Kimi is: its configuration, its modules, and the counts of parameters, cache bytes and scratch bytes that follow."""
