"""What is new of each video, for any number of viewers at their own pace. Holds numbers, no chunk bytes.

Everything here belongs to the event loop's thread.
"""

import asyncio
from bisect import bisect_right
from dataclasses import dataclass
from operator import attrgetter
from typing import Any
from weakref import WeakValueDictionary

from vidgen.serve.errors import not_found
from vidgen.serve.records import Record, Status
from vidgen.serve.store import Event, Store

ENDED = (Status.COMPLETED, Status.FAILED)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A block of frames that lies in the job's segments."""

    index: int
    first_frame: int
    num_frames: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Applied:
    """A prompt that a viewer wished for and the first frame that shows it."""

    event_id: str
    frame: int


class Feed:
    """One video as it grows: its newest record, its chunks, and what happened to it."""

    def __init__(self, record: Record, events: list[Event]) -> None:
        self.record = record
        self.chunks: list[Chunk] = []
        self.applied: list[Applied] = []
        self.progress: dict[str, Any] | None = None  # the last word of a render that runs
        self.viewers = 0
        self.is_gone = False  # deleted
        self._events: list[Event] = []
        self._times_progressed = 0
        self._news = asyncio.Event()
        for event in events:
            self._keep(event)

    @property
    def is_ended(self) -> bool:
        """Whether nothing more will come, unless the video is resumed."""
        return self.is_gone or self.record.status in ENDED

    async def next_chunk(self, after: int) -> Chunk | None:
        """The chunk after that one (-1 for the first), once there is one; None when it was the last."""
        while True:
            news = self._news
            if after + 1 < len(self.chunks):
                return self.chunks[after + 1]
            if self.is_ended:
                return None
            await news.wait()

    async def next_event(self, after: int) -> Event | None:
        """The next thing to tell after the event of that number; None when it was the last.

        Progress is not kept: it has the number of the event before it, and comes only to whoever waits.
        """
        seen = self._times_progressed
        while True:
            news = self._news
            place = bisect_right(self._events, after, key=attrgetter("number"))
            if place < len(self._events):
                return self._events[place]
            if self.is_ended:
                return None
            if self._times_progressed != seen and self.progress is not None:
                last = self._events[-1].number if self._events else 0
                return Event(number=last, name="progress", data=self.progress)
            await news.wait()

    def _keep(self, event: Event) -> None:
        if self._events and event.number <= self._events[-1].number:
            return  # was read from the store while it was on its way here
        self._events.append(event)
        if event.name == "chunk" and event.data["index"] == len(self.chunks):
            self.chunks.append(Chunk(**event.data))
        elif event.name == "prompt_applied":
            self.applied.append(Applied(event.data["event_id"], event.data["frame"]))

    def tell(self, record: Record, event: Event | None = None) -> None:
        """Take over what is new and wake all who wait."""
        self.record = record
        if event is not None:
            self._keep(event)
        self._wake()

    def tell_progress(self, progress: dict[str, Any]) -> None:
        """Wake all who wait with how far the render is."""
        self.progress = progress
        self._times_progressed += 1
        self._wake()

    def end(self) -> None:
        """Send everybody away: the video is deleted."""
        self.is_gone = True
        self._wake()

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()


class Feeds:
    """The feeds that somebody holds. One that nobody holds costs nothing: the store can tell it again."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._feeds: WeakValueDictionary[str, Feed] = WeakValueDictionary()

    def of(self, id: str) -> Feed:
        """The feed of a video, live or long finished; keep it as long as you watch. ApiError 404 for none."""
        feed = self._feeds.get(id)
        if feed is None:
            record = self._store.get(id)
            if record is None:
                raise not_found(id)
            feed = self._feeds[id] = Feed(record, self._store.events(id, 0))
        return feed

    def publish(self, record: Record, event: Event | None = None) -> None:
        """Tell a change that is in the store already."""
        if feed := self._feeds.get(record.id):
            feed.tell(record, event)

    def publish_progress(self, id: str, progress: dict[str, Any]) -> None:
        """Tell how far a render is."""
        if feed := self._feeds.get(id):
            feed.tell_progress(progress)

    def forget(self, id: str) -> None:
        """A video is deleted: its viewers are sent away."""
        if feed := self._feeds.pop(id, None):
            feed.end()
