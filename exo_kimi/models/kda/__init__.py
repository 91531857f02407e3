"""Kimi Delta Attention: the rule of its states, what a sequence holds of it, and the attention of a layer."""
