"""Anthropic's Messages API: its requests, content blocks and events."""
