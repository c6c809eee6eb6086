"""LayerNorm with adaLN modulation, fused: the step between the matrix products of a DiT block."""
