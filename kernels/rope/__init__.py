"""RMSNorm of queries or keys with the rotary embedding that follows it, fused."""
