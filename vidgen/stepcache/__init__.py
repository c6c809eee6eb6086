"""Step caches: steps at which the model is not run, since what it would say is known well enough."""
