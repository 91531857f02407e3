"""Calibration: one pass over texts, a layer at a time, that measures what each expert and layer is worth."""
