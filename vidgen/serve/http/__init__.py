"""The HTTP API: what every request passes, routes, answers."""
