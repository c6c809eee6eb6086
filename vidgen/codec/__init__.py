"""Latents to pixels and back, streaming and causal."""
