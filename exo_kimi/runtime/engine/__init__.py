"""The leader's head: scheduler, sequences, admission, prefix-cache policy, speculation."""
