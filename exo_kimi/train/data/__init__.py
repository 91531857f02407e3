"""What the small model is trained on: conversations, their token ids in batches, and the vocabulary."""
