"""Machines, links and clusters: what chips declare, what was measured, and cluster files."""
