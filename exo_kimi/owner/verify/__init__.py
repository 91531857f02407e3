"""`exo-kimi verify`: in minutes, what only this machine can show, and one file to send."""
