"""A running exo through its HTTP API: its cluster seen, planned for, placed on, and directories made for it."""
