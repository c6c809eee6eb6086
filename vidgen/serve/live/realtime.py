"""WS /v1/realtime/video: a live session, or the watching of any video, as a conversation in JSON and fMP4.

The names of the messages are vLLM-Omni's. What goes out is written by viewers.py.
"""

import asyncio
import json
import logging
import time
from typing import Any

from fastapi import APIRouter
from starlette.websockets import WebSocket, WebSocketDisconnect

from vidgen.serve.admission import check_prompt, make_record
from vidgen.serve.errors import ApiError, conflict, error, internal, invalid, over_limit
from vidgen.serve.http.security import only_video, require
from vidgen.serve.http.state import find, server_of
from vidgen.serve.live.audience import Audience, audience_of
from vidgen.serve.live.viewers import Cursor, Viewer
from vidgen.serve.live.wire import Wire
from vidgen.serve.records import Kind, Status
from vidgen.serve.schema import Interaction, Message, Ping, SessionResume, SessionStart, Stop, parse_message
from vidgen.serve.work.feeds import Feed

router = APIRouter()
LOG = logging.getLogger(__name__)
MAX_MESSAGE_CHARACTERS = 60_000  # the protocol closes a socket above 64 KiB without a word
MAX_MISTAKES = 100  # messages of one connection that cannot be done
LOOK_EVERY_S = 1.0
TELL_EVERY_S = 15.0  # a place in the queue, so that nobody in between takes the socket for dead
# close codes of RFC 6455 and IANA's registry: after the last two session.resume may be tried again
NORMAL, UNWANTED, BROKEN, RESTARTING, TRY_AGAIN = 1000, 1008, 1011, 1012, 1013


class Over(Exception):
    """The conversation ends, with an error to tell or without."""

    def __init__(self, close_code: int, reason: ApiError | None = None) -> None:
        super().__init__(close_code)
        self.close_code, self.reason = close_code, reason


class Left(Exception):
    """The client is gone."""


@router.websocket("/v1/realtime/video")
async def realtime(websocket: WebSocket) -> None:
    """A conversation. Refused before it is accepted without a valid key, ticket, or Origin."""
    require(websocket)
    await websocket.accept()
    await Conversation(websocket, audience_of(websocket.app)).run()


class Conversation:
    """One WebSocket, from its first message to its last."""

    def __init__(self, websocket: WebSocket, audience: Audience) -> None:
        self._websocket, self._audience = websocket, audience
        self._server, self._patience = server_of(websocket), audience.patience
        self._wire = Wire(websocket)
        self._heard_at = time.monotonic()
        self._num_mistakes = 0
        self._transition_chunks = 0  # where an interaction says nothing

    async def run(self) -> None:
        """Talk until one side ends it."""
        try:
            feed, cursor = await self._open()
            await self._watch(feed, cursor)
        except (Left, WebSocketDisconnect):
            pass
        except Over as over:
            await self._end(over)
        except Exception:
            LOG.exception("a socket failed")
            await self._end(Over(BROKEN, internal()))

    async def _end(self, over: Over) -> None:
        last_words = None if over.reason is None else error_message(over.reason)
        await self._wire.close(over.close_code, last_words, self._patience.close_s)

    async def _open(self) -> tuple[Feed, Cursor]:
        """What the client wants to see, and from where on. Over when it does not say so in time."""
        deadline = asyncio.get_running_loop().time() + self._patience.start_s
        while True:
            raw: dict[str, Any] = {}
            try:
                async with asyncio.timeout_at(deadline):
                    raw = await self._read()
                match parse_message(raw):
                    case SessionStart() as start:
                        return await self._start(start)
                    case SessionResume() as resume:
                        return await self._resume(resume)
                    case Ping(nonce=nonce):
                        answer: dict[str, Any] = {"type": "session.pong", "nonce": nonce}
                    case _:
                        raise conflict(f"{raw['type']} came before session.start", "not_started")
            except TimeoutError:
                text = f"no session.start or session.resume within {self._patience.start_s:g} s"
                raise Over(UNWANTED, error(408, "start_timeout", text)) from None
            except ApiError as mistake:
                answer = self._mistake(mistake, raw)
            await self._tell(answer, deadline)

    async def _tell(self, message: dict[str, Any], deadline: float) -> None:
        try:
            async with asyncio.timeout_at(deadline):
                await self._wire.text(message)
        except TimeoutError:
            raise Over(UNWANTED) from None

    async def _read(self) -> dict[str, Any]:
        """The next message. ApiError when it is none that could be understood."""
        message = await self._websocket.receive()
        if message["type"] == "websocket.disconnect":
            raise Left
        self._heard_at = time.monotonic()
        text = message.get("text")
        if text is None:
            raise invalid("a binary message: send JSON as text", code="not_text")
        if len(text) > MAX_MESSAGE_CHARACTERS:
            raise over_limit("message", f"{len(text)} characters", MAX_MESSAGE_CHARACTERS, "send less")
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError):
            raise invalid(f"message={text!r:.60}: is no JSON", code="invalid_json") from None
        if not isinstance(raw, dict):
            raise invalid(f"message={text!r:.60}: need a JSON object with a type", code="invalid_json")
        return raw

    def _mistake(self, mistake: ApiError, raw: dict[str, Any]) -> dict[str, Any]:
        """The answer to a message that cannot be done. Over after too many."""
        self._num_mistakes += 1
        if self._num_mistakes > MAX_MISTAKES:
            raise Over(UNWANTED, error(429, "too_many_mistakes", f"{MAX_MISTAKES} messages made no sense"))
        event_id = raw.get("event_id")
        return error_message(mistake, event_id if isinstance(event_id, str) else None)

    async def _start(self, start: SessionStart) -> tuple[Feed, Cursor]:
        server = self._server
        if only_video(self._websocket) is not None:
            raise error(403, "only_one_video", "this ticket is good for one video: session.resume that")
        self._audience.check_room()
        owner = require(self._websocket)
        if start.input_reference is not None:  # a message is too short for one
            raise invalid("input_reference: a live session begins without a picture", "input_reference")
        record = await asyncio.to_thread(make_record, start, server.config, owner, Kind.SESSION)
        record = await server.scheduler.submit(record)
        self._transition_chunks = start.transition_chunks
        return server.feeds.of(record.id), Cursor(start.policy, -1, -1, self._patience.max_lag_chunks)

    async def _resume(self, resume: SessionResume) -> tuple[Feed, Cursor]:
        record = await find(self._websocket, resume.session_id)
        feed = self._server.feeds.of(record.id)
        newest = len(feed.chunks) - 1
        after = max(-1, newest - 1) if resume.last_seq == "live" else resume.last_seq
        if not -1 <= after <= newest:
            message = f"last_seq={after}: need -1 to {newest}, the newest chunk, or live"
            raise error(422, "invalid_value", message, "last_seq")
        self._transition_chunks = record.request.get("transition_chunks") or 0
        return feed, Cursor(resume.policy, after, newest, self._patience.max_lag_chunks)

    async def _watch(self, feed: Feed, cursor: Cursor) -> None:
        """Write, listen and look after both, until one of them raises Over or Left."""
        video_id = feed.record.id
        viewer = Viewer(
            self._wire,
            feed,
            self._server.segments(feed.record),
            cursor,
            hold=lambda is_held: self._audience.hold(video_id, viewer, is_held),
        )
        try:
            with self._audience.seat(video_id, viewer):
                await self._side_by_side(viewer)
        except ApiError as no_room:
            self._audience.leave_alone(video_id)  # a session that was started for nobody
            raise Over(TRY_AGAIN, no_room) from None

    async def _side_by_side(self, viewer: Viewer) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(viewer.follow_chunks())
                group.create_task(viewer.follow_events())
                group.create_task(self._write(viewer))
                group.create_task(self._listen(viewer))
                group.create_task(self._look_after(viewer))
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None  # the first is why the others ended

    async def _write(self, viewer: Viewer) -> None:
        try:
            await viewer.write()
        except FileNotFoundError:
            raise Over(UNWANTED, deleted()) from None
        record = viewer.feed.record
        if viewer.feed.is_gone:
            raise Over(UNWANTED, deleted())
        if record.status is Status.FAILED:
            code, message = record.error_code or "failed", record.error_message or "it failed"
            await self._wire.text({"type": "error", "code": code, "message": message})
        frames_done = sum(chunk.num_frames for chunk in viewer.feed.chunks)
        await self._wire.text({"type": "session.done", "status": record.status, "frames_done": frames_done})
        raise Over(NORMAL)

    async def _listen(self, viewer: Viewer) -> None:
        """Do what the client says, one message after the other; a slow answer slows its asking."""
        while True:
            raw: dict[str, Any] = {}
            try:
                raw = await self._read()
                await self._do(parse_message(raw), viewer)
            except ApiError as mistake:
                await viewer.say(**self._mistake(mistake, raw))

    async def _do(self, message: Message, viewer: Viewer) -> None:
        match message:
            case Ping(nonce=nonce):
                await viewer.say(type="session.pong", nonce=nonce)
            case Interaction():
                await self._interact(message, viewer)
            case Stop():
                if viewer.feed.record.kind is not Kind.SESSION:
                    raise conflict("session.stop: this is a video; cancel it over HTTP", "not_a_session")
                await self._server.scheduler.finish(viewer.feed.record.id)
            case SessionStart() | SessionResume():
                raise conflict(f"{message.type}: a socket shows one video; open another", "already_started")

    async def _interact(self, message: Interaction, viewer: Viewer) -> None:
        """Pass a new prompt on. One that was passed on before a connection broke is not wished for twice."""
        feed, event_id, prompt = viewer.feed, message.event_id, message.event.prompt
        if feed.record.kind is not Kind.SESSION:
            raise conflict(
                "session.interaction: the prompt of a video stays; start a session", "not_a_session"
            )
        check_prompt(prompt, self._server.config.limits)
        self._audience.remember(feed, event_id, prompt)
        if await viewer.tell_applied(event_id):
            return
        length = message.transition_chunks
        length = self._transition_chunks if length is None else length
        try:
            await self._server.scheduler.interact(feed.record.id, event_id, prompt, length)
        except ApiError as refusal:
            if refusal.code != "duplicate":  # else it is open still
                raise
        await viewer.say(type="session.interaction.queued", event_id=event_id)

    async def _look_after(self, viewer: Viewer) -> None:
        """Tell the place in the queue; end what hangs. Raises Over."""
        patience, feed = self._patience, viewer.feed
        told, told_at = None, 0.0
        while True:
            now = time.monotonic()
            if feed.record.status is not Status.IN_PROGRESS or self._audience.is_held(feed.record.id):
                viewer.news_at = now  # nothing is due
            self._check(viewer, now)
            if feed.record.status is Status.QUEUED:
                place = await asyncio.to_thread(self._server.store.queue_position, feed.record.id)
                if place is not None and (place != told or now - told_at > TELL_EVERY_S):
                    told, told_at = place, now
                    await viewer.say(type="queue.status", session_id=feed.record.id, position=place)
            await asyncio.sleep(min(LOOK_EVERY_S, patience.socket_s / 4, patience.stall_s / 4))

    def _check(self, viewer: Viewer, now: float) -> None:
        patience = self._patience
        if self._server.draining.is_set():
            raise Over(RESTARTING)
        if self._wire.blocked_s() > patience.socket_s:
            text = f"the socket took nothing for {patience.socket_s:g} s; resume when you can read"
            raise Over(TRY_AGAIN, error(408, "viewer_stalled", text))
        stall_s = patience.load_s if viewer.feed.progress is None else patience.stall_s
        if viewer.is_waiting and now - viewer.news_at > stall_s:
            text = f"nothing came of the render for {stall_s:g} s; resume to look again"
            raise Over(TRY_AGAIN, error(504, "stalled", text))
        if now - max(self._heard_at, self._wire.sent_at) > patience.idle_s:
            raise Over(UNWANTED, error(408, "idle", f"nothing was said for {patience.idle_s:g} s"))


def deleted() -> ApiError:
    return error(404, "deleted", "the video was deleted while you watched it")


def error_message(mistake: ApiError, event_id: str | None = None) -> dict[str, Any]:
    """What a client is told of a refusal; `event_id` is of the message that it is about."""
    about = {} if event_id is None else {"event_id": event_id}
    return {"type": "error", "code": mistake.code, "message": mistake.message, **about}
