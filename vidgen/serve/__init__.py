"""The streaming server: HTTP and WebSocket API, durable queue, workers, web page, client.

vidgen.serve.Client talks to a server that `vidgen serve` runs.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vidgen.serve.client.blocking import AsyncClient, Client

__all__ = ["AsyncClient", "Client"]


def __getattr__(name: str) -> Any:
    """The clients, imported when they are asked for: the server needs none."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vidgen.serve import client

    return getattr(client, name)
