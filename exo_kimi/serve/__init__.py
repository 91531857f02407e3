"""The ChatGPT-compatible HTTP API over a text engine."""
