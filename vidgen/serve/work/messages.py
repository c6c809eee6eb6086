"""The words between the server and its workers, over a pipe of their own. Plain data, no chunk bytes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

# down: what a worker is told


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Begin a video, or go on with it. `only_finish` makes its output from the blocks that it has."""

    video_id: str
    folder: Path  # the video's; the job's is in it
    job: dict[str, Any]  # a JobConfig without the places of its output and input
    image: Path | None = None  # that it begins with
    only_finish: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Stop:
    """End the running video: give it up before the next forward, make it an early output there, or save its
    state at the end of the tick and leave it to another time."""

    video_id: str
    how: Literal["cancel", "finish", "interrupt"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Hold:
    """Wait before the next forward, or go on."""

    video_id: str
    held: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Interact:
    """Another prompt for the blocks that are not admitted yet."""

    video_id: str
    wish_id: str
    prompt: str
    transition_blocks: int


# up: what a worker tells


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """It lives. `num_forwards` grows as long as a render gets on."""

    video_id: str | None
    num_forwards: int
    is_held: bool
    rank_ages_s: tuple[float, ...] = ()  # since each rank was heard, and last the decoder


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """The models are loaded and warm."""

    device: str
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class CannotStart:
    """A model cannot be loaded; the worker ends."""

    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Progressed:
    """How far a render is."""

    video_id: str
    ticks_done: int
    num_ticks: int
    frames_done: int
    eta_s: float | None
    num_blocks: int
    disk_bytes: int
    ranks: list[dict[str, Any]] = field(default_factory=list)  # name, pid, host of each


@dataclass(frozen=True, kw_only=True, slots=True)
class Committed:
    """A block is durable in the job's segments. Told again of all blocks when a job goes on."""

    video_id: str
    index: int
    first_frame: int
    num_frames: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptApplied:
    """A wish holds from this frame, in this block, on."""

    video_id: str
    wish_id: str
    prompt: str
    frame: int
    block: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRefused:
    """A wish cannot be met."""

    video_id: str
    wish_id: str
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Noted:
    """A line for people: something went wrong and was mended."""

    video_id: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """The worker has let go of a video. `code` and `message` say why it failed."""

    video_id: str
    outcome: Literal["completed", "cancelled", "interrupted", "failed"]
    frames_done: int
    disk_bytes: int
    code: str | None = None
    message: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Lost:
    """The worker's process is gone. Told by the parent's half, as the last word of a process."""

    exit_code: int | None


Order = Run | Stop | Hold | Interact
Report = (
    Beat | Ready | CannotStart | Progressed | Committed | PromptApplied | PromptRefused | Noted | Ended | Lost
)
