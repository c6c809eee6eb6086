"""Kinds of checkpoints: what the engine asks of each, and how each answers."""
