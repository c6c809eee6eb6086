"""What the server knows of a video, from its acceptance on."""

import re
import secrets
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

ID = re.compile(r"(video|session)_[0-9a-f]{32}")


class Status(StrEnum):
    """OpenAI's four; a cancelled video is failed with the code `cancelled`."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"


ENDED = (Status.COMPLETED, Status.FAILED)


class Kind(StrEnum):
    """A video of a known length, or a live session that is ended early."""

    VIDEO = "video"
    SESSION = "session"


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A video or session. Times are unix seconds; sizes are those of the frames that come out."""

    id: str
    kind: Kind = Kind.VIDEO
    owner: str  # the API key's name, or "local"
    model: str  # its name on this server
    status: Status = Status.QUEUED
    priority: int = 0
    created_at: int
    started_at: int | None = None
    completed_at: int | None = None
    expires_at: int | None = None
    prompt: str
    request: dict[str, Any]  # what the client asked
    job: dict[str, Any]  # JobConfig as JSON, without the places of its output and input
    width: int
    height: int
    num_frames: int
    fps: int
    seed: int
    chunks_done: int = 0
    chunks_total: int
    frames_done: int = 0
    eta_s: float | None = None
    attempt: int = 0
    error_code: str | None = None
    error_message: str | None = None
    disk_bytes: int = 0

    @property
    def progress(self) -> int:
        """Percent, 0 to 100; 100 only when completed."""
        if self.status == Status.COMPLETED:
            return 100
        return min(99, 100 * self.frames_done // max(1, self.num_frames))

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come, unless it is resumed."""
        return self.status in ENDED

    @property
    def input_suffix(self) -> str | None:
        """Of the picture that the video begins with, kept at `config.input_file`; None without one."""
        return self.request.get("input_suffix")


def make_id(kind: Kind) -> str:
    """A new id that nobody can guess."""
    return f"{kind.value}_{secrets.token_hex(16)}"


def is_id(text: str) -> bool:
    """Whether a text has the exact form of this server's ids."""
    return ID.fullmatch(text) is not None


def video_object(record: Record, queue_position: int | None = None) -> dict[str, Any]:
    """The video as the API shows it: OpenAI's fields, then ours. See schema.VideoObject."""
    failed = None
    if record.error_code is not None:
        failed = {"code": record.error_code, "message": record.error_message or record.error_code}
    seconds = round(record.num_frames / record.fps, 3)
    return {
        "id": record.id,
        "object": "video",
        "model": record.model,
        "status": record.status.value,
        "progress": record.progress,
        "created_at": record.created_at,
        "completed_at": record.completed_at,
        "expires_at": record.expires_at,
        "prompt": record.prompt,
        "seconds": f"{seconds:.3f}".rstrip("0").rstrip("."),
        "size": f"{record.width}x{record.height}",
        "remixed_from_video_id": None,
        "error": failed,
        "kind": record.kind.value,
        "started_at": record.started_at,
        "queue_position": queue_position,
        "priority": record.priority,
        "num_frames": record.num_frames,
        "fps": record.fps,
        "seed": record.seed,
        "chunks_done": record.chunks_done,
        "chunks_total": record.chunks_total,
        "frames_done": record.frames_done,
        "eta_s": record.eta_s,
        "attempt": record.attempt,
        "disk_bytes": record.disk_bytes,
    }
