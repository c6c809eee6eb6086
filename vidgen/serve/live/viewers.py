"""What one viewer gets next: flow control of a video whose chunks lie on the disk, for a socket of any speed.

A viewer holds the bytes of one chunk at a time. What it has not fetched yet stays on the disk; what its
socket cannot take in time is left out (policy drop) or not made yet (policy pause).
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vidgen.serve.live.mime import mime_of
from vidgen.serve.live.wire import Wire
from vidgen.serve.work.feeds import Chunk, Feed

Policy = Literal["drop", "pause"]
MAX_TEXTS = 256  # waiting for the socket; whoever adds one more waits too


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """The chunk that is sent next, and the chunks before it that never will be."""

    chunk: Chunk
    dropped: tuple[int, int] | None = None  # first and last


class Cursor:
    """Where a viewer is in a video. `after` is the last chunk it has, -1 for none.

    What was there when it came is owed to it whole; only of what is made under its eyes it may lose some.
    """

    def __init__(self, policy: Policy, after: int, newest: int, max_lag_chunks: int) -> None:
        self.policy, self.after = policy, after
        self._owed = newest
        self._max_lag = max_lag_chunks

    def lag(self, newest: int) -> int:
        """Chunks made since it came that it does not have."""
        return newest - max(self.after, self._owed)

    def turn(self, chunks: list[Chunk], is_ended: bool) -> Turn | None:
        """What to send now; None when it has all there is. A video that has ended runs away from nobody."""
        newest = len(chunks) - 1
        first = self.after + 1
        if first > newest:
            return None
        behind_s_owed = first > self._owed
        if self.policy == "drop" and behind_s_owed and not is_ended and self.lag(newest) > self._max_lag:
            self.after = newest
            return Turn(chunk=chunks[newest], dropped=(first, newest - 1))
        self.after = first
        return Turn(chunk=chunks[first])

    def should_hold(self, newest: int, is_held: bool) -> bool:
        """Whether generation waits for this viewer: from the greatest lag on until it has caught up."""
        return self.policy == "pause" and self.lag(newest) > (1 if is_held else self._max_lag)


class Viewer:
    """Sends one video to one socket: texts as they come, chunks as its cursor says."""

    def __init__(
        self,
        wire: Wire,
        feed: Feed,
        segments: Path,
        cursor: Cursor,
        hold: Callable[[bool], None],
    ) -> None:
        self.wire, self.feed, self.cursor = wire, feed, cursor
        self._segments, self._hold = segments, hold
        self._texts: deque[dict[str, Any]] = deque()
        self._progress: dict[str, Any] | None = None
        self._applied: dict[str, dict[str, Any]] = {}
        self._news, self._room = asyncio.Event(), asyncio.Event()
        self._is_started = self._is_holding = self._is_told = False
        self.news_at = time.monotonic()  # of the render

    @property
    def is_waiting(self) -> bool:
        """Whether it has all there is."""
        return self.cursor.after >= len(self.feed.chunks) - 1

    async def say(self, **message: Any) -> None:
        """Have a text sent in its turn; waits while the socket takes none."""
        while len(self._texts) >= MAX_TEXTS:
            self._room.clear()
            await self._room.wait()
        self._texts.append(message)
        self._news.set()

    async def follow_chunks(self) -> None:
        """Notice new chunks, also while a send is stuck. Returns at the video's end."""
        seen = len(self.feed.chunks) - 1
        while (chunk := await self.feed.next_chunk(seen)) is not None:
            seen = chunk.index
            self.news_at = time.monotonic()
            self._regulate()
            self._news.set()
        self._news.set()

    async def follow_events(self) -> None:
        """Pass on what happens to the render, and which prompts were applied before. Returns at its end."""
        after = 0
        while (event := await self.feed.next_event(after)) is not None:
            after = event.number
            self.news_at = time.monotonic()
            if event.name == "progress":
                self._progress = {"type": "session.progress", **event.data}  # only the newest counts
                self._news.set()
            elif event.name == "prompt_applied":
                self._applied[event.data["event_id"]] = event.data
                await self.say(type="session.interaction.applied", **event.data)
            elif event.name == "prompt_refused":
                await self.say(type="session.interaction.refused", **event.data)
            elif event.name == "note" and not self.feed.is_ended:
                await self.say(type="session.note", **event.data)
        self._is_told = True
        self._news.set()

    async def tell_applied(self, event_id: str) -> bool:
        """Whether a wish was fulfilled already; then that is told again."""
        data = self._applied.get(event_id)
        if data is not None:
            await self.say(type="session.interaction.applied", **data)
        return data is not None

    async def write(self) -> None:
        """Send until everything is there. FileNotFoundError when the video is deleted meanwhile."""
        while True:
            self._news.clear()
            is_ended = self.feed.is_ended  # before the last look at its chunks
            await self._write_texts()
            if self.feed.chunks and not self._is_started:
                await self._write_start()
            turn = self.cursor.turn(self.feed.chunks, is_ended)
            if turn is not None:
                await self._write_chunk(turn)
                self._regulate()
            elif is_ended and self._is_told and not self._texts:
                return
            else:
                await self._news.wait()

    async def _write_texts(self) -> None:
        while self._texts:
            message = self._texts.popleft()
            self._room.set()
            await self.wire.text(message)
        if self._progress is not None:
            message, self._progress = self._progress, None
            await self.wire.text(message)

    async def _write_start(self) -> None:
        init = await asyncio.to_thread((self._segments / "init.mp4").read_bytes)
        record = self.feed.record
        await self.wire.text(
            {
                "type": "video.start",
                "session_id": record.id,
                "mime": mime_of(init),
                "width": record.width,
                "height": record.height,
                "fps": record.fps,
                "num_frames": record.num_frames,
            }
        )
        await self.wire.binary(init)
        self._is_started = True

    async def _write_chunk(self, turn: Turn) -> None:
        if turn.dropped is not None:
            first, last = turn.dropped
            await self.wire.text({"type": "video.dropped", "from_seq": first, "to_seq": last})
        chunk, fps = turn.chunk, self.feed.record.fps
        await self.wire.text(
            {
                "type": "video.chunk_metadata",
                "seq": chunk.index,
                "pts": chunk.first_frame / fps,
                "first_frame": chunk.first_frame,
                "num_frames": chunk.num_frames,
                "duration_s": chunk.num_frames / fps,
                "is_keyframe": True,  # a segment begins with one
                "num_bytes": chunk.num_bytes,
            }
        )
        # read when the socket has room, so that nobody's bytes wait in memory
        await self.wire.binary(await asyncio.to_thread(self._segment(chunk.index).read_bytes))

    def _segment(self, index: int) -> Path:
        return self._segments / f"{index:06d}.m4s"

    def _regulate(self) -> None:
        should_hold = self.cursor.should_hold(len(self.feed.chunks) - 1, self._is_holding)
        if should_hold != self._is_holding:
            self._is_holding = should_hold
            self._hold(should_hold)
