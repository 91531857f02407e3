"""The terminal chat and the demo: programs that talk to a server over HTTP."""
