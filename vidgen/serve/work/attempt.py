"""One order to make a video, as its render sees it: what the parent wants of it, and what the parent is told.

Imports torch: only worker processes import this.
"""

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from vidgen.engine import Engine
from vidgen.journal import Journal
from vidgen.live import Live, Wish
from vidgen.media.blocks import WrittenBlock
from vidgen.media.segments import write_atomically
from vidgen.serve.work.messages import (
    Beat,
    Committed,
    Hold,
    Interact,
    Noted,
    Order,
    Progressed,
    PromptApplied,
    PromptRefused,
    Report,
    Run,
    Stop,
)
from vidgen.types import Progress

PROGRESS_EVERY_S = 0.5
WEIGH_EVERY_S = 5.0
THUMBNAIL_PIXELS = 640
How = Literal["cancel", "finish", "interrupt"]
STOPS: tuple[How, ...] = ("cancel", "finish", "interrupt")  # an earlier one goes over a later one


class Stopped(Exception):
    """The parent wants no more of this video."""


class Attempt:
    """Hooks of a render. `hear` is called by the thread that listens, all others by the one that renders."""

    def __init__(self, run: Run, send: Callable[[Report], None]) -> None:
        self.run, self.folder, self._send = run, run.folder, send
        self.job_folder = run.folder / "job"
        self.stop: How | None = "finish" if run.only_finish else None
        self.is_finishing = False  # the output is being made: only to cancel it counts now
        self.frames_done = 0
        self._changed = threading.Condition()
        self._is_held = False
        self._wishes: list[Wish] = []
        self._num_forwards = 0
        self._progress_at = self._weighed_at = 0.0
        self._disk_bytes = 0
        self._ranks_at = 0  # the time of the file where they are named

    def hear(self, order: Order) -> None:
        """Take in what the parent says about this video."""
        with self._changed:
            if isinstance(order, Stop):
                self.stop = next(how for how in STOPS if how in (order.how, self.stop))
            elif isinstance(order, Hold):
                self._is_held = order.held
            elif isinstance(order, Interact):
                wish = Wish(id=order.wish_id, prompt=order.prompt, transition_blocks=order.transition_blocks)
                self._wishes.append(wish)
            self._changed.notify_all()

    def beat(self) -> Beat:
        return Beat(video_id=self.run.video_id, num_forwards=self._num_forwards, is_held=self._is_held)

    def live(self, engine: Engine) -> Live:
        """The hooks for a render with this engine."""
        return Live(
            engine=engine,
            check=self._check,
            wishes=self._take_wishes,
            applied=self._applied,
            refused=self._refused,
            committed=self.committed,
        )

    def should_stop(self) -> bool:
        return self.stop is not None

    def report(self, progress: Progress) -> None:
        """Tell how far it is, now and then."""
        now = time.monotonic()
        if now - self._progress_at < PROGRESS_EVERY_S and progress.ticks_done < progress.num_ticks:
            return
        self._progress_at = now
        self._send(
            Progressed(
                video_id=self.run.video_id,
                ticks_done=progress.ticks_done,
                num_ticks=progress.num_ticks,
                frames_done=self.frames_done,
                num_blocks=progress.num_blocks,
                eta_s=progress.eta_s if progress.ticks_this_run else None,
                disk_bytes=self.weigh(),
                ranks=self._new_ranks(),
            )
        )

    def note(self, text: str) -> None:
        self._send(Noted(video_id=self.run.video_id, text=self.shown(text)))

    def shown(self, text: str) -> str:
        """A message in one line, without the server's folders."""
        line = " ".join(text.split())
        return line.replace(str(self.job_folder), "the job").replace(str(self.folder), "the video")

    def committed(self, block: WrittenBlock) -> None:
        """Tell of a durable block."""
        self.frames_done = max(self.frames_done, block.first_frame + block.num_frames)
        segment = self.job_folder / "segments" / f"{block.block:06d}.m4s"
        if block.block == 0:
            with suppress(OSError):  # a full disk: the video is worth more
                save_thumbnail(segment, self.folder / "thumbnail.jpg")
        self._send(
            Committed(
                video_id=self.run.video_id,
                index=block.block,
                first_frame=block.first_frame,
                num_frames=block.num_frames,
                num_bytes=segment.stat().st_size,
            )
        )

    def tell_committed(self) -> None:
        """Tell of all blocks that there are already."""
        with Journal(self.job_folder) as journal:
            blocks = journal.written()
        for block in blocks:
            self.committed(block)

    def weigh(self, now: bool = False) -> int:
        """Bytes on disk, measured now and then."""
        if now or time.monotonic() - self._weighed_at > WEIGH_EVERY_S:
            self._disk_bytes = folder_bytes(self.folder)
            self._weighed_at = time.monotonic()
        return self._disk_bytes

    def _new_ranks(self) -> list[dict[str, Any]]:
        """Where the ranks run, if that has changed; see Journal.place."""
        path = self.job_folder / "ranks.json"
        with suppress(OSError):
            changed_at = path.stat().st_mtime_ns
            if changed_at != self._ranks_at:
                self._ranks_at = changed_at
                return json.loads(path.read_text())
        return []

    def _check(self) -> None:
        """Before every forward: wait while held. Stopped when there is to be none."""
        self._num_forwards += 1
        with self._changed:
            while self._is_held and self.stop is None:
                self._changed.wait()
            if self.stop == "cancel" or (self.stop == "finish" and not self.is_finishing):
                raise Stopped(self.stop)

    def _take_wishes(self) -> list[Wish]:
        """What was wished for since."""
        with self._changed:
            wishes, self._wishes = self._wishes, []
        return wishes

    def _applied(self, wish: Wish, block: int, frame: int) -> None:
        self._send(
            PromptApplied(
                video_id=self.run.video_id, wish_id=wish.id, prompt=wish.prompt, frame=frame, block=block
            )
        )

    def _refused(self, wish: Wish, why: str) -> None:
        self._send(PromptRefused(video_id=self.run.video_id, wish_id=wish.id, why=self.shown(why)))


def save_thumbnail(segment: Path, target: Path) -> None:
    """The first frame of a first segment, as a small JPEG, unless it is there."""
    import av

    if target.exists():
        return
    data = segment.with_name("init.mp4").read_bytes() + segment.read_bytes()
    with av.open(BytesIO(data), "r", format="mp4") as container:
        picture: Image.Image = next(container.decode(video=0)).to_image()
    picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    write_atomically(target, buffer.getvalue())


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder; those that go meanwhile count as none."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total
