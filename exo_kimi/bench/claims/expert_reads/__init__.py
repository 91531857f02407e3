"""Reads of experts: past the page cache and through it, from packed records and as published."""
