"""Texts as token ids: what calibration and comparison run over."""
