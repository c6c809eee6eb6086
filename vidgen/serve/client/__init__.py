"""The client of a vidgen server: `Client`, and `AsyncClient` for programs with an event loop.

Needs httpx and websockets, not the engine. Failures are ServerError: status, code, message.
"""

from vidgen.serve.client.asynchronous import SERVER, AsyncClient
from vidgen.serve.client.blocking import Client, Session
from vidgen.serve.client.http import Event, ServerError, Unreachable, Video, VideoFailed
from vidgen.serve.client.live import Chunk, LiveStream, Start

__all__ = [
    "SERVER",
    "AsyncClient",
    "Chunk",
    "Client",
    "Event",
    "LiveStream",
    "ServerError",
    "Session",
    "Start",
    "Unreachable",
    "Video",
    "VideoFailed",
]
