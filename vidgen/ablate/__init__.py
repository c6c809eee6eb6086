"""Ablations: many ways to render the same videos, each held against one that is exact."""
