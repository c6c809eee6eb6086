"""Makes the built-in model: a procedural world and a flow-matching trainer."""
