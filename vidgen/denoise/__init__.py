"""From noise to clean latents: the specification."""
