"""OpenAI's Responses API: its requests, items and events, and the responses that are kept."""
