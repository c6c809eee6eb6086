"""The sending half of a WebSocket: a clock on each message, little in the kernel, a way to cut it off."""

import asyncio
import json
import socket
import time
from contextlib import suppress
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

UNSENT_BYTES = 128 * 1024  # in the kernel: else several megabytes hide from us that nobody reads


class Wire:
    """Messages to one client. A send waits while more than one message is in the socket's own buffer."""

    def __init__(self, websocket: WebSocket) -> None:
        self._websocket = websocket
        self.sent_at = time.monotonic()
        self._blocked_since: float | None = None
        self._transport = _transport(websocket._receive)
        sock = self._transport.get_extra_info("socket") if self._transport else None
        if sock is not None and hasattr(socket, "TCP_NOTSENT_LOWAT"):
            with suppress(OSError):  # not TCP
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)

    def blocked_s(self) -> float:
        """For how long the socket has not taken the message that is being sent."""
        return 0.0 if self._blocked_since is None else time.monotonic() - self._blocked_since

    async def text(self, message: dict[str, Any]) -> None:
        """Send JSON. WebSocketDisconnect when the client is gone."""
        await self._send({"type": "websocket.send", "text": json.dumps(message)})

    async def binary(self, data: bytes) -> None:
        await self._send({"type": "websocket.send", "bytes": data})

    async def _send(self, message: dict[str, Any]) -> None:
        self._blocked_since = time.monotonic()
        await self._websocket.send(message)
        self._blocked_since, self.sent_at = None, time.monotonic()

    async def close(self, code: int, last_words: dict[str, Any] | None, patience_s: float) -> None:
        """Say goodbye, and cut the connection if the other side does not even read that in time."""
        deadline = asyncio.get_running_loop().time() + patience_s
        with suppress(TimeoutError, WebSocketDisconnect, RuntimeError):  # RuntimeError: was closed before
            async with asyncio.timeout_at(deadline):
                if last_words is not None:
                    await self.text(last_words)
                await self._websocket.close(code)
        transport = self._transport
        while transport is not None and transport.get_write_buffer_size():
            if asyncio.get_running_loop().time() > deadline:
                transport.abort()  # close() alone would keep the connection until its buffer is read
                return
            await asyncio.sleep(patience_s / 20)


def _transport(receive: Any) -> asyncio.Transport | None:
    """The connection beneath, for which ASGI has no word: uvicorn's is an attribute of the object whose
    method `receive` is, and middleware keeps that method as `_receive`."""
    while (owner := getattr(receive, "__self__", None)) is not None:
        if transport := getattr(owner, "transport", None):
            return transport
        receive = getattr(owner, "_receive", None)
    return None
