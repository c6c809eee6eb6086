"""What a video file holds: its frames with their times and keyframes, and how they are to be turned."""

# F frames, H height, W width; pictures are uint8 RGB

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

AXIS_TOLERANCE = 0.02  # of the display matrix: about one degree
LARGEST_DENOMINATOR = 1001  # of broadcast rates


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """How a stored picture becomes an upright one: mirrored left to right, then turned counter-clockwise."""

    mirrored: bool = False
    quarter_turns: int = 0

    def upright(self, pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """[..., H, W, 3] as a player shows them."""
        if self.mirrored:
            pictures = pictures[..., ::-1, :]
        return np.ascontiguousarray(np.rot90(pictures, self.quarter_turns, axes=(-3, -2)))

    @property
    def swaps_sides(self) -> bool:
        return self.quarter_turns % 2 == 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """The frames of a file in the order of their display; sizes are those of upright pictures."""

    path: Path
    formats: frozenset[str]
    pts: tuple[int, ...]
    key_pts: tuple[int, ...]
    time_base: Fraction
    fps: Fraction
    width: int
    height: int
    pixel_aspect: Fraction
    turn: Turn
    decord_turn: Turn  # what decord does of it by itself

    def times_s(self) -> tuple[float, ...]:
        """Seconds from the first frame to each."""
        return tuple(float((pts - self.pts[0]) * self.time_base) for pts in self.pts)


class _Packet(NamedTuple):
    pts: int | None
    is_keyframe: bool
    is_discard: bool
    is_corrupt: bool

    @classmethod
    def of(cls, packet: "Packet") -> "_Packet":
        """Without the data: all of a file would not fit in memory."""
        return cls(packet.pts, packet.is_keyframe, packet.is_discard, packet.is_corrupt)


def list_frames(path: Path) -> Listing:
    """The frames in `path`, from its packets: exact with B-frames, fragments, edit lists and varying rates.

    Of a file that is cut off the frames that are there, but for a plain MP4, which says how many it had.
    ValueError in one line for one that is cut, and for other damage.
    """
    import av

    if not path.stat().st_size:
        raise no_video(path, "the file is empty")
    try:
        with av.open(path) as container:
            stream = video_stream(path, container)
            packets = [_Packet.of(packet) for packet in container.demux(stream) if packet.size]
            whole = [packet for packet in packets if not packet.is_corrupt]
            is_mp4 = "mp4" in container.format.name
            if is_mp4 and len(whole) < stream.frames and _ends_inside_a_box(path):
                raise ValueError(
                    f"{path}: is cut off, {len(whole)} of its {stream.frames} frames are there; copy it anew"
                )
            shown = [packet for packet in whole if not packet.is_discard]
            if not shown:
                raise no_video(path, "its video stream has no frames")
            times = {packet.pts for packet in shown if packet.pts is not None}
            if any(packet.pts is None for packet in shown):
                raise ValueError(f"{path}: has frames without time stamps; convert it to MP4")
            keys = [packet.pts for packet in shown if packet.is_keyframe and packet.pts is not None]
            return _listing(path, container, stream, sorted(times), sorted(keys))
    except av.FFmpegError as error:
        raise no_video(path, f"PyAV says {error.strerror!r}") from error


def no_video(path: Path, cause: str) -> ValueError:
    """The error for a file that has no video in it."""
    return ValueError(f"{path}: {cause}: PyAV finds no video in it; give a video file such as MP4 (H.264)")


def video_stream(path: Path, container: "InputContainer") -> "VideoStream":
    from av.stream import Disposition

    # the cover of a song is a video stream too, of one picture
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        kinds = sorted({stream.type for stream in container.streams})
        raise no_video(path, f"it has {' and '.join(kinds) or 'no'} streams only")
    return streams[0]


def _ends_inside_a_box(path: Path) -> bool:
    """Whether the last box of an MP4 says that it goes on after the end of the file; else it was all copied.

    An edit list hides frames of whole files.
    """
    size, start = path.stat().st_size, 0
    with path.open("rb") as file:
        while start + 8 <= size:
            file.seek(start)
            header = file.read(16)
            length = int.from_bytes(header[:4], "big")
            if length == 1:
                length = int.from_bytes(header[8:16], "big")
            if length == 0:
                return False
            start += max(length, 8)
    return start != size


def _listing(
    path: Path, container: "InputContainer", stream: "VideoStream", pts: list[int], key_pts: list[int]
) -> Listing:
    time_base = stream.time_base or Fraction(1)
    formats = frozenset(container.format.name.split(","))
    matrix = _display_matrix(path, container, stream, pts[0])
    turn = _turn(path, matrix)
    fps = Fraction(stream.average_rate or stream.guessed_rate or 0)
    if not fps and len(pts) > 1:
        mean = (len(pts) - 1) / ((pts[-1] - pts[0]) * time_base)
        fps = mean.limit_denominator(LARGEST_DENOMINATOR)
    aspect = Fraction(stream.sample_aspect_ratio or 1)
    width, height = stream.width, stream.height
    return Listing(
        path=path,
        formats=formats,
        pts=tuple(pts),
        key_pts=tuple(key_pts),
        time_base=time_base,
        fps=fps,
        width=height if turn.swaps_sides else width,
        height=width if turn.swaps_sides else height,
        pixel_aspect=1 / aspect if turn.swaps_sides else aspect,
        turn=turn,
        # its FFmpeg 4 knows the angle of the matrix in MP4 and MOV alone, and takes mirroring for a half turn
        decord_turn=Turn(quarter_turns=_quarter_turns(*matrix[:2]) if "mp4" in formats else 0),
    )


def _display_matrix(
    path: Path, container: "InputContainer", stream: "VideoStream", pts: int
) -> tuple[int, int, int, int]:
    """(a, b, c, d) of x' = a x + c y, y' = b x + d y, with y down; of FFmpeg's side data."""
    from av.sidedata.sidedata import Type

    container.seek(pts, stream=stream, backward=True)
    for frame in container.decode(stream):
        for data in cast(Iterable[Any], frame.side_data):
            if data.type == Type.DISPLAYMATRIX:
                a, b, _, c, d = np.frombuffer(bytes(data)[:20], np.int32).tolist()
                return a, b, c, d
        return 1, 0, 0, 1
    raise no_video(path, "its first frame cannot be decoded")


def _turn(path: Path, matrix: tuple[int, int, int, int]) -> Turn:
    a, b, c, d = matrix
    straight, crossed = max(abs(a), abs(d)), max(abs(b), abs(c))
    if min(straight, crossed) > AXIS_TOLERANCE * max(straight, crossed):
        raise ValueError(
            f"{path}: is to be shown askew; convert it to a video that is turned by 90 degrees at most"
        )
    mirrored = a * d < b * c
    return Turn(mirrored=mirrored, quarter_turns=_quarter_turns(-a, -b) if mirrored else _quarter_turns(a, b))


def _quarter_turns(a: int, b: int) -> int:
    """Counter-clockwise, of a turn that takes right to (a, b), y down."""
    if abs(a) >= abs(b):
        return 0 if a >= 0 else 2
    return 1 if b < 0 else 3
