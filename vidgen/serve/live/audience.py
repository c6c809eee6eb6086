"""Who watches what: how many there may be, who holds a render, and what becomes of a session left alone."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from starlette.applications import Starlette

from vidgen.serve.errors import ApiError, conflict, error
from vidgen.serve.http.state import Server
from vidgen.serve.records import Kind
from vidgen.serve.work.feeds import Feed

LOG = logging.getLogger(__name__)
LATER = {"Retry-After": "10"}
MAX_WISHES = 64  # of a session, by event_id


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long is waited for whom, and how far a viewer may fall behind."""

    start_s: float = 10.0  # for session.start or session.resume
    idle_s: float = 600.0  # nothing from a client, and nothing for it
    socket_s: float = 30.0  # for a socket to take a message
    stall_s: float = 60.0  # for a sign of life from a render; the scheduler gives one every few seconds
    load_s: float = 300.0  # for the first
    grace_s: float = 10.0  # for somebody to come back to a session
    close_s: float = 2.0  # for the last words to leave
    max_lag_chunks: int = 4


class Audience:
    """The viewers of one server, by video. For the event loop's thread alone."""

    def __init__(self, server: Server, patience: Patience) -> None:
        self.patience = patience
        self._server = server
        self._viewers: dict[str, set[object]] = {}
        self._holders: dict[str, set[object]] = {}
        self._graces: dict[str, asyncio.Task[None]] = {}
        self._wishes: WeakKeyDictionary[Feed, dict[str, str]] = WeakKeyDictionary()

    @property
    def num_viewers(self) -> int:
        return sum(map(len, self._viewers.values()))

    def check_room(self) -> None:
        """ApiError 503 when all places are taken."""
        allowed = self._server.config.limits.max_viewers
        if self.num_viewers >= allowed:
            text = f"all {allowed} places for viewers are taken; try again later"
            raise error(503, "too_many_viewers", text, headers=LATER)

    @contextmanager
    def seat(self, video_id: str, viewer: object) -> Iterator[None]:
        """A place in front of a video, while within. ApiError 503 when all are taken.

        When the last one has left a session, that ends after its grace unless somebody comes back.
        """
        self.check_room()
        self._viewers.setdefault(video_id, set()).add(viewer)
        if grace := self._graces.pop(video_id, None):
            grace.cancel()
        try:
            yield
        finally:
            self.hold(video_id, viewer, False)
            self._viewers[video_id].discard(viewer)
            if not self._viewers[video_id]:
                del self._viewers[video_id]
                self.leave_alone(video_id)

    def hold(self, video_id: str, viewer: object, is_held: bool) -> None:
        """Let a render wait as long as any viewer of it wants that."""
        holders = self._holders.setdefault(video_id, set())
        was_held = bool(holders)
        (holders.add if is_held else holders.discard)(viewer)
        if not holders:
            del self._holders[video_id]
        if was_held != self.is_held(video_id):
            self._server.scheduler.hold(video_id, not was_held)

    def is_held(self, video_id: str) -> bool:
        return video_id in self._holders

    def leave_alone(self, video_id: str) -> None:
        """End a session after its grace unless somebody watches it; a server does it at its start, too."""
        if video_id in self._viewers or video_id in self._graces or self._server.draining.is_set():
            return
        try:
            feed = self._server.feeds.of(video_id)
        except ApiError:  # deleted
            return
        if feed.record.kind is Kind.SESSION and not feed.is_ended:
            self._graces[video_id] = asyncio.create_task(self._end_after_grace(feed))

    async def _end_after_grace(self, feed: Feed) -> None:
        video_id = feed.record.id
        await asyncio.sleep(self.patience.grace_s)
        del self._graces[video_id]  # from here on it is too late to come back
        if self._server.draining.is_set():
            return  # it goes on at the next start
        try:
            await self._server.scheduler.finish(video_id)
        except ApiError as refusal:
            LOG.info("%s, left alone: %s", video_id, refusal.message)

    def remember(self, feed: Feed, event_id: str, prompt: str) -> None:
        """ApiError 409 when an event_id stands for another prompt already."""
        wishes = self._wishes.setdefault(feed, {})
        if wishes.setdefault(event_id, prompt) != prompt:
            raise conflict(f"event_id={event_id}: was another prompt before; give a new one", "duplicate")
        if len(wishes) > MAX_WISHES:
            del wishes[next(iter(wishes))]


def audience_of(app: Starlette) -> Audience:
    """The audience of an application's server; there is one."""
    if not hasattr(app.state, "audience"):
        server: Server = app.state.server
        timings = server.config.timings
        patience = Patience(
            start_s=timings.session_start_timeout_s,
            grace_s=timings.session_grace_s,
            load_s=timings.start_timeout_s,
        )
        app.state.audience = Audience(server, patience)
    return app.state.audience
