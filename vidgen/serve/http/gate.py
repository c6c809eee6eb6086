"""What every request passes before it reaches a route: host, origin, key, the size of its body, headers."""

import json
import logging
import time
from collections.abc import Callable
from typing import Any

from h11 import LocalProtocolError
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vidgen.serve.errors import ApiError, internal, too_large
from vidgen.serve.http.security import SAFE_METHODS, identify
from vidgen.serve.http.state import Server

OPEN_PATHS = frozenset({"/health"})
API_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
# blob: media from MediaSource, workers of the HLS player
PAGE_POLICY = (
    "default-src 'self'; media-src 'self' blob:; img-src 'self' blob: data:; worker-src 'self' blob:; "
    "connect-src 'self' ws://{host} wss://{host}; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
}
logger = logging.getLogger(__name__)


class Gate:
    """ASGI middleware. `is_page(path)` tells the paths of the web page, which asks for a key itself."""

    def __init__(self, app: ASGIApp, server: Server, is_page: Callable[[str], bool]) -> None:
        self.app, self.server, self.is_page = app, server, is_page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        else:
            await _Passage(self, scope, receive, send).go()


class _Passage:
    """One request on its way through the gate."""

    def __init__(self, gate: Gate, scope: Scope, receive: Receive, send: Send) -> None:
        self.gate, self.scope, self._receive, self._send = gate, scope, receive, send
        self.connection = HTTPConnection(scope)
        self.is_socket = scope["type"] == "websocket"
        self.is_page = gate.is_page(scope["path"])
        self.status: int | None = None
        self.num_bytes = 0
        self.max_bytes = gate.server.config.limits.max_body_bytes

    async def go(self) -> None:
        started = time.perf_counter()
        try:
            self._check()
            await self.gate.app(self.scope, self.receive, self.send)
        except ApiError as error:
            await self._refuse(error)
        except (ClientDisconnect, LocalProtocolError):
            pass  # it left, or broke HTTP, in the middle of its body: nobody is there to answer
        except Exception:
            logger.exception("%s %s failed", self.scope.get("method", "WebSocket"), self.scope["path"])
            if self.status is not None:
                raise  # half an answer is out: closing the connection is all that is left to say
            await self._refuse(internal())
        finally:
            if not self.is_socket:
                took_s = time.perf_counter() - started
                self.gate.server.metrics.answered(self.scope, self.status or 0, took_s)

    def _check(self) -> None:
        """ApiError unless the request may go on."""
        server, headers = self.gate.server, self.connection.headers
        host = headers.get("host", "")
        server.origins.check_host(host)
        if self.is_socket or self.scope["method"] not in SAFE_METHODS:
            server.origins.check_origin(headers.get("origin"), host)
        if self.scope["path"] not in OPEN_PATHS and not self.is_page:
            owner, only_video = identify(self.connection, server.keys, server.tickets)
            self.scope["vidgen.owner"], self.scope["vidgen.only_video"] = owner, only_video
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self.max_bytes:
            raise _body_too_large(self.max_bytes)

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self.num_bytes += len(message.get("body", b""))
            if self.num_bytes > self.max_bytes:
                raise _body_too_large(self.max_bytes)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] in ("http.response.start", "websocket.http.response.start"):
            self.status = message["status"]
            given = {name.lower() for name, _ in message.get("headers", ())}
            added = [(name.encode(), value.encode()) for name, value in self._headers().items()]
            kept = [(name, value) for name, value in added if name not in given]
            message = {**message, "headers": [*message.get("headers", ()), *kept]}
        elif message["type"] == "websocket.accept":
            self.status = 101
        await self._send(message)

    def _headers(self) -> dict[str, str]:
        if self.is_page:
            host = self.connection.headers.get("host", "")
            return {**HEADERS, "content-security-policy": PAGE_POLICY.format(host=host)}
        return {**HEADERS, "content-security-policy": API_POLICY, "cache-control": "no-store"}

    async def _refuse(self, error: ApiError) -> None:
        """Answer with an error, unless an answer is on its way already."""
        if self.status is not None:
            return
        if self.is_socket and "websocket.http.response" not in self.scope.get("extensions", {}):
            await self._send({"type": "websocket.close", "code": 1008, "reason": error.code})
            return
        kind = "websocket.http.response" if self.is_socket else "http.response"
        body = render_json(error.body())
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *((name.lower().encode(), value.encode()) for name, value in error.headers.items()),
        ]
        if error.status == 413:
            headers.append((b"connection", b"close"))  # the rest of the body is not read
        await self.send({"type": f"{kind}.start", "status": error.status, "headers": headers})
        await self.send({"type": f"{kind}.body", "body": body})


def _body_too_large(max_bytes: int) -> ApiError:
    return too_large(f"the body is longer than {max_bytes} bytes, which is the limit; send less")


def render_json(content: Any) -> bytes:
    """JSON in ASCII: text that is no valid Unicode, told to who sent it, is escaped and no error."""
    return json.dumps(content, separators=(",", ":")).encode("ascii")
