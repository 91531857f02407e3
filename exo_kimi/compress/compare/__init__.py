"""Comparison of two models: how far their next tokens lie apart, and what their replies look like."""
