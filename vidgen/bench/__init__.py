"""How fast and how small: figures of this machine, as rows that print and as JSON. No claims, no limits."""
