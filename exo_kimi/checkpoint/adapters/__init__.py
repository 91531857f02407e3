"""LoRA and DoRA adapters on disk, in mlx-lm's format and in PEFT's."""
