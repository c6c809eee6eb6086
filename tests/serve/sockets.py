"""Clients for tests: of the live socket, one that takes messages and one that reads nothing; of bytes."""

import base64
import io
import json
import os
import socket
import statistics
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import av
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.serve.conftest import RunningServer

PATH = "/v1/realtime/video"
DEADLINE_S = 20.0


@contextmanager
def connected(
    port: int, first: dict[str, Any] | None = None, headers: dict[str, str] | None = None, query: str = ""
) -> Iterator[ClientConnection]:
    """A client that takes messages one by one, and has sent its first."""
    url = f"ws://127.0.0.1:{port}{PATH}{query}"
    options: dict[str, Any] = {"max_queue": 1, "max_size": None, "close_timeout": 0.2}
    with connect(url, proxy=None, compression=None, additional_headers=headers, **options) as client:
        if first is not None:
            client.send(json.dumps(first))
        yield client


def deaf(port: int, first: dict[str, Any], headers: dict[str, str] | None = None) -> socket.socket:
    """A client that has sent its first message and never reads an answer; its socket takes little."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(DEADLINE_S)
    client.connect(("127.0.0.1", port))
    fields = {
        "Host": f"127.0.0.1:{port}",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
        "Sec-WebSocket-Version": "13",
        **(headers or {}),
    }
    head = [f"GET {PATH} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    client.sendall("\r\n".join(head).encode())
    assert b" 101 " in client.recv(1024)
    data = json.dumps(first).encode()
    # one masked text frame (RFC 6455 5.2); a mask of zeros changes nothing
    client.sendall(b"\x81" + struct.pack("!BH", 0x80 | 126, len(data)) + bytes(4) + data)
    return client


def resume(session_id: str, last_seq: int | str = -1, policy: str = "drop") -> dict[str, Any]:
    return {"type": "session.resume", "session_id": session_id, "last_seq": last_seq, "policy": policy}


def receive(client: ClientConnection) -> dict[str, Any]:
    """The next text, with the bytes that follow it as `data`."""
    text = client.recv(DEADLINE_S)
    assert isinstance(text, str)
    message = json.loads(text)
    if message["type"] in ("video.start", "video.chunk_metadata"):
        message["data"] = client.recv(DEADLINE_S)
    return message


def receive_until(client: ClientConnection, kind: str) -> list[dict[str, Any]]:
    """All messages up to the next of a kind."""
    deadline = time.monotonic() + 2 * DEADLINE_S
    found = [receive(client)]
    while found[-1]["type"] != kind:
        assert time.monotonic() < deadline, [message["type"] for message in found]
        found.append(receive(client))
    return found


def receive_chunks(client: ClientConnection, count: int) -> list[dict[str, Any]]:
    """All messages up to the `count`th chunk from here."""
    return [message for _ in range(count) for message in receive_until(client, "video.chunk_metadata")]


def chunks(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [message for message in messages if message["type"] == "video.chunk_metadata"]


def seqs(messages: list[dict[str, Any]]) -> list[int]:
    return [message["seq"] for message in chunks(messages)]


def wait_until(is_so: Callable[[], bool], deadline_s: float = DEADLINE_S) -> float:
    """Seconds until it was so; fails after the deadline."""
    started = time.monotonic()
    while not is_so():
        assert time.monotonic() - started < deadline_s, "not in time"
        time.sleep(0.01)
    return time.monotonic() - started


def session_of(messages: list[dict[str, Any]]) -> str:
    return next(m["session_id"] for m in messages if m["type"] == "video.start")


def frame_times(data: bytes) -> list[int]:
    """The pts of all frames of an MP4, each of them decoded."""
    with av.open(io.BytesIO(data), "r", format="mp4") as container:
        times = [frame.pts for frame in container.decode(video=0)]
    assert all(time is not None for time in times)
    return [time for time in times if time is not None]


def p50_p95(values: list[float]) -> str:
    ordered = sorted(values)
    return (
        f"p50 {statistics.median(ordered) * 1e3:.0f} ms, p95 {ordered[int(len(ordered) * 0.95)] * 1e3:.0f} ms"
    )


def handshake(server: RunningServer, query: str = "", **headers: str) -> int:
    """The status with which a WebSocket is answered; 101 is a yes."""
    url = f"ws://127.0.0.1:{server.port}{PATH}{query}"
    try:
        with connect(url, additional_headers=headers, open_timeout=10, close_timeout=5, proxy=None):
            return 101
    except InvalidStatus as refused:
        return refused.response.status_code


def raw(server: RunningServer, data: bytes, deadline_s: float = 15) -> bytes:
    """What comes back for bytes as they are, to the connection's end or the head of an answer."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=deadline_s) as found:
        found.sendall(data)
        text = b""
        while piece := found.recv(65536):
            text += piece
            if b"Connection: close" not in data and b"\r\n\r\n" in text:
                break
    return text
