"""How ranks that hold the same layers share a forward: tokens, heads, branches of guidance, clips."""
