"""A video between the queue and its end."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from vidgen.serve.config import ServerConfig, input_file, video_folder
from vidgen.serve.records import Kind, Record, Status
from vidgen.serve.work.feeds import Feed
from vidgen.serve.work.messages import Ended, Hold, Progressed, Run, Stop
from vidgen.serve.work.replica import Replica

Ending = tuple[str, str]  # error code, message
CANCELLED: Ending = "cancelled", "cancelled before its end"
NO_FRAMES: Ending = "cancelled", "stopped before its first frames"
RESTARTED: Ending = "server_restarted", "the server was restarted; what there was of the session is kept"


SIGN_OF_LIFE_S = 5.0  # viewers hear at least so often from a render that runs
HEARD_S = 3.0


@dataclass(kw_only=True)
class Running:
    """A video that a worker is on, or that waits for one. The feed is held, so that it stays."""

    feed: Feed
    replica: Replica | None = None
    only_finish: bool = False  # make the output from what is there
    fault: Ending | None = None  # how it ends whatever becomes of the output
    stop: Literal["cancel", "finish", "interrupt"] | None = None
    holds: set[str] = field(default_factory=set)  # who wants it to wait before its next forward
    plays_until: float = 0.0  # a viewer who plays each chunk as soon as it may
    wishes: set[str] = field(default_factory=set)  # neither applied nor refused
    num_deaths: int = 0  # of workers, since the last chunk
    progress: dict[str, Any] = field(default_factory=dict)
    told_at: float = 0.0
    kept_at: float = 0.0
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def record(self) -> Record:
        return self.feed.record

    @property
    def id(self) -> str:
        return self.feed.record.id

    def order(self, config: ServerConfig) -> Run:
        """What a worker is told."""
        suffix = self.record.input_suffix
        data = config.data.absolute()
        return Run(
            video_id=self.id,
            folder=video_folder(data, self.id),
            job=self.record.job,
            image=input_file(data, self.id, suffix) if suffix else None,
            only_finish=self.only_finish,
        )

    def ask(self, how: Literal["cancel", "finish", "interrupt"]) -> None:
        """Have the worker stop; to cancel counts for more than all else."""
        if self.stop != "cancel":
            self.stop = how
        if self.replica is not None:
            self.replica.send(Stop(video_id=self.id, how=self.stop))

    def hold(self, held: bool, who: str) -> None:
        """Have the worker wait before the next forward as long as anybody wants that."""
        was_held = bool(self.holds)
        (self.holds.add if held else self.holds.discard)(who)
        if bool(self.holds) != was_held:
            self.tell_hold()

    def tell_hold(self) -> None:
        """Tell the worker whether to wait."""
        if self.replica is not None:
            self.replica.send(Hold(video_id=self.id, held=bool(self.holds)))

    def plays(self, num_frames: int) -> None:
        """Count a new chunk as played by a viewer who never pauses."""
        self.plays_until = max(time.monotonic(), self.plays_until) + num_frames / self.record.fps

    def keep_pace(self, lead_s: float) -> None:
        """Have a live session wait that is far ahead of who watches it: what is made cannot be changed."""
        if self.record.kind is not Kind.SESSION or not self.feed.chunks:
            return
        ahead_s = self.plays_until - time.monotonic()
        chunk_s = self.feed.chunks[-1].num_frames / self.record.fps
        if ahead_s > lead_s + chunk_s:
            self.hold(True, "pace")
        elif ahead_s < lead_s:
            self.hold(False, "pace")

    def is_quiet(self, now: float) -> bool:
        """Whether viewers should hear again that the render is alive, because nothing else tells them."""
        is_heard = self.replica is not None and self.replica.facts().beat_age_s < HEARD_S
        return is_heard and bool(self.progress) and now - self.told_at > SIGN_OF_LIFE_S

    def progressed(self, report: Progressed) -> dict[str, Any]:
        """The event for how far it is."""
        record = self.record
        self.told_at = time.monotonic()
        self.progress = {
            "progress": record.progress,
            "frames_done": record.frames_done,
            "num_frames": record.num_frames,
            "chunks_done": record.chunks_done,
            "chunks_total": record.chunks_total,
            "ticks_done": report.ticks_done,
            "num_ticks": report.num_ticks,
            "eta_s": report.eta_s,
            "ranks": report.ranks or self.progress.get("ranks", []),
        }
        return self.progress

    def ending(self, report: Ended) -> Ending | None:
        """The fault that it ends with; None when it is completed."""
        if report.outcome == "failed":
            return report.code or "render_failed", report.message or "failed"
        if report.outcome == "cancelled":
            return self.fault or (NO_FRAMES if self.stop != "cancel" else CANCELLED)
        return self.fault


def ended_fields(config: ServerConfig, record: Record, fault: Ending | None) -> dict[str, Any]:
    """What changes in a record when its video ends. One that ended early is as long as it is."""
    now = int(time.time())
    retention_s = config.limits.retention_s
    fields: dict[str, Any] = {
        "status": Status.COMPLETED if fault is None else Status.FAILED,
        "error_code": None if fault is None else fault[0],
        "error_message": None if fault is None else fault[1],
        "expires_at": None if retention_s is None else now + int(retention_s),
        "eta_s": None,
    }
    if fault is None:
        fields |= {
            "completed_at": now, "num_frames": record.frames_done, "chunks_total": record.chunks_done,
        }  # fmt: skip
    return fields


def status_data(record: Record, **changes: Any) -> dict[str, Any]:
    """The event that tells a record's status, after these changes."""
    fields = {name: changes.get(name, getattr(record, name)) for name in ("status", "error_code")}
    code = fields["error_code"]
    message = changes.get("error_message", record.error_message)
    return {
        "status": fields["status"].value,
        "error": None if code is None else {"code": code, "message": message},
        "chunks_done": record.chunks_done,
        "frames_done": record.frames_done,
        "attempt": changes.get("attempt", record.attempt),
    }
