"""From messages to token ids and back: tokenizer, chat templates, reasoning, tool calls and constrained decoding."""
