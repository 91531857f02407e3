"""Weights from the hub or from another machine: only what this machine needs, resumed at any byte, verified."""
