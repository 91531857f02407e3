"""Checks of OpenAI's documented chat API over plain HTTP, against any server."""
