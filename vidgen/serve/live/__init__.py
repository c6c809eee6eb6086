"""Live viewers over WebSockets, each at its own pace."""
