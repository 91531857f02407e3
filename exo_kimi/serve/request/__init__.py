"""OpenAI's request bodies: their fields, checked, and their translation to requests of the dialogue."""
