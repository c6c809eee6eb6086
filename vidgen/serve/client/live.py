"""A video or session over the WebSocket: chunks as they are made and prompts on the way, through cuts."""

import asyncio
import json
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from vidgen.serve.client.http import AWAY, Connection, ServerError, error_of

PATH = "/v1/realtime/video"
LARGEST_MESSAGE = 1 << 28  # bytes: a chunk of a large video
REFUSED = (1002, 1003, 1007, 1008)  # close codes that another try would only meet again
LOST = (ConnectionClosed, OSError)  # OSError: also a timeout
Policy = Literal["drop", "pause"]
Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """What a player needs before the first chunk."""

    id: str
    mime: str
    width: int
    height: int
    fps: int
    num_frames: int
    init: bytes = field(repr=False)  # the fMP4 init segment: with the chunks after it, a playable file


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """One fMP4 fragment: some frames that begin with a keyframe."""

    seq: int
    pts_s: float
    first_frame: int
    num_frames: int
    duration_s: float
    is_keyframe: bool
    data: bytes = field(repr=False)
    start: Start


class LiveStream:
    """Reads one video. Who wants something reads the socket until it is there, so nothing piles up unasked.

    After a cut it attaches again behind the last chunk that came. `report` gets the server's messages
    that are neither chunks nor answers.
    """

    def __init__(self, connection: Connection, opening: dict[str, Any], report: Report | None = None) -> None:
        self.id: str | None = opening.get("session_id")
        self.start: Start | None = None
        self.done: dict[str, Any] | None = None
        self._connection, self._opening, self._report = connection, opening, report
        self._policy = opening.get("policy", "pause")
        self._last_seq: int | str = opening.get("last_seq", -1)
        self._socket: ClientConnection | None = None
        self._reading, self._attaching = asyncio.Lock(), asyncio.Lock()
        self._header: dict[str, Any] | None = None  # whose bytes come next
        self._is_attached = False  # the server has answered the opening of this socket
        self._trouble: ServerError | None = None  # told on this socket, before it is closed
        self._chunks: deque[Chunk] = deque()
        self._asked: dict[str, dict[str, Any]] = {}  # prompt changes that are not applied yet
        self._applied: dict[str, int | ServerError] = {}
        self._outage = connection.outage()

    async def open(self) -> None:
        """Attach, and read until the server says what it is. ServerError when it refuses."""
        while self.start is None and self.id is None and self.done is None:
            await self._read()

    async def next_chunk(self) -> Chunk | None:
        """The next chunk in order; None when there is none after."""
        while not self._chunks and self.done is None:
            await self._read()
        return self._chunks.popleft() if self._chunks else None

    async def chunks(self) -> AsyncGenerator[Chunk, None]:
        """All chunks to come."""
        while chunk := await self.next_chunk():
            yield chunk

    async def change_prompt(self, prompt: str, transition_chunks: int | None = None) -> int:
        """The first frame that is made for the prompt. ServerError when the change is refused."""
        wish_id = f"wish_{secrets.token_hex(8)}"
        wish = {"type": "session.interaction", "event_id": wish_id, "event": {"prompt": prompt}}
        wish |= {} if transition_chunks is None else {"transition_chunks": transition_chunks}
        self._asked[wish_id] = wish
        await self._send(wish)
        while wish_id not in self._applied and self.done is None:
            await self._read()
        self._asked.pop(wish_id, None)
        found = self._applied.pop(wish_id, None)
        if isinstance(found, int):
            return found
        raise found or ServerError(0, "session_ended", f"{self.id}: ended before the prompt could change")

    async def stop(self) -> None:
        """End the session with what is there; returns when the server has done so."""
        await self._send({"type": "session.stop"})
        while self.done is None:
            await self._read()
            if self._trouble is not None:
                raise self._trouble

    async def leave(self) -> None:
        """Tell the server that nobody waits for the session's end, and close."""
        with suppress(*LOST):
            if self.done is None and self._socket is not None:
                await self._socket.send(json.dumps({"type": "session.stop"}))
        await self.close()

    async def close(self) -> None:
        socket, self._socket = self._socket, None
        if socket is not None:
            await socket.close()

    async def _send(self, message: dict[str, Any]) -> None:
        while self.done is None:
            is_open = self._socket is not None
            try:
                socket = await self._attached()
                if is_open or message.get("event_id") not in self._asked:
                    await socket.send(json.dumps(message))
                return  # else attaching has sent it
            except LOST as error:
                await self._cut(error)

    async def _read(self) -> None:
        """Read until one message was dealt with, or the lock's other owner has done so."""
        is_mine = not self._reading.locked()
        async with self._reading:
            if not is_mine or self.done is not None:
                return
            try:
                socket = await self._attached()
                data = await socket.recv()
                self._outage.over()
            except LOST as error:
                await self._cut(error)
                return
            # one at a time: a reader may be cancelled between a message and its bytes
            if isinstance(data, str):
                self._deal_with(json.loads(data))
            elif self._header is not None:
                message, self._header = self._header, None
                self._take(message, data)

    async def _attached(self) -> ClientConnection:
        async with self._attaching:
            if self._socket is not None:
                return self._socket
            url = "ws" + self._connection.url.removeprefix("http") + PATH
            try:
                socket = await connect(
                    url,
                    additional_headers=self._connection.headers,
                    ssl=self._connection.tls,
                    proxy=None,
                    compression=None,  # H.264 does not shrink
                    max_size=LARGEST_MESSAGE,
                )
            except InvalidStatus as error:
                raise _refusal(error) from error
            except InvalidHandshake as error:
                if isinstance(error.__cause__, EOFError):
                    raise ConnectionError("the connection was cut") from error
                raise ServerError(0, "not_vidgen", f"{url}: {error}") from error
            opening = self._opening
            if self.id is not None:
                opening = {"type": "session.resume", "session_id": self.id, "last_seq": self._last_seq}
                opening["policy"] = self._policy
            for message in (opening, *self._asked.values()):
                await socket.send(json.dumps(message))
            self._header, self._trouble, self._is_attached, self._socket = None, None, False, socket
            return socket

    async def _cut(self, error: BaseException) -> None:
        """Forget the socket and wait for a better time. ServerError when there will be none."""
        if isinstance(error, ConnectionClosed) and error.rcvd and error.rcvd.code in REFUSED:
            closed = ServerError(0, "refused", error.rcvd.reason or f"closed with {error.rcvd.code}")
            raise (self._trouble or closed) from error
        if self.id is None and self._outage.is_known and self._opening["type"] == "session.start":
            message = "the connection was cut before the server had named the session"
            raise ServerError(0, "session_lost", message) from error
        await self.close()
        await self._outage.sit_out(error)

    def _deal_with(self, message: dict[str, Any]) -> None:
        kind, wish_id = message.get("type"), message.get("event_id", "")
        self.id = self.id or message.get("session_id")
        self._is_attached = self._is_attached or kind != "error"
        if kind in ("video.start", "video.chunk_metadata"):
            self._header = message  # its bytes come next
            return
        if kind == "session.interaction.applied":
            self._applied[wish_id] = message["frame"]
        elif kind == "session.interaction.refused":
            self._applied[wish_id] = ServerError(0, "refused", message["message"])
        elif kind == "error":
            error = ServerError(0, str(message.get("code")), str(message.get("message")))
            if not self._is_attached:
                raise error  # the opening is refused
            if wish_id in self._asked:
                self._applied[wish_id] = error
            else:
                self._trouble = error
        elif kind == "session.done":
            self.done = message
        if self._report is not None:
            self._report(message)

    def _take(self, message: dict[str, Any], data: bytes) -> None:
        if message["type"] == "video.start":
            facts = {key: message[key] for key in ("mime", "width", "height", "fps", "num_frames")}
            self.start = Start(id=message["session_id"], init=data, **facts)
            return
        assert self.start is not None, "a chunk before video.start"
        seq = message["seq"]
        if isinstance(self._last_seq, int) and seq <= self._last_seq:
            return  # came before the cut
        self._last_seq = seq
        facts = {key: message[key] for key in ("first_frame", "num_frames", "duration_s", "is_keyframe")}
        self._chunks.append(Chunk(seq=seq, pts_s=message["pts"], data=data, start=self.start, **facts))


def _refusal(error: InvalidStatus) -> ServerError | ConnectionError:
    """What the server answered instead of opening a WebSocket; an outage when it is away."""
    answer = error.response
    request = httpx.Request("GET", PATH)
    headers = dict(answer.headers.raw_items())
    found = error_of(
        httpx.Response(
            answer.status_code, headers=headers, content=bytes(answer.body or b""), request=request
        )
    )
    return ConnectionError(str(found)) if found.status in AWAY else found
