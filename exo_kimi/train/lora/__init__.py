"""LoRA and DoRA of any Kimi that fits in memory, its weights as they are on disk: packed ones stay packed."""
