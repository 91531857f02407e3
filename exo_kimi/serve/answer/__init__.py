"""OpenAI's answers: the JSON of a reply's events, sent whole or as server-sent events."""
