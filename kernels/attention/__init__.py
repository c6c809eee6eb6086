"""Attention over [B, S, H, D]: one call, many backends."""
