"""H.264 segments of a fragmented MP4 (one keyframe, one moof + mdat each), and the way into one file."""

# F frames, H height, W width; pictures are uint8 RGB

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from av.container import OutputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

# frag_discont + no timestamp shift: the fragment keeps the decode time it has in the whole video.
# skip_trailer: no index of a single segment after it. bitexact: no library version in the init segment.
FRAGMENT_OPTIONS = {
    "movflags": "empty_moov+default_base_moof+frag_keyframe+frag_discont+skip_trailer",
    "avoid_negative_ts": "disabled",
    "fflags": "+bitexact",
}
BT709 = 1  # matrix, primaries and transfer share this number in H.264
LIMITED_RANGE = 1
BOX_HEADER_BYTES = 8
MAX_SIDE = 16384  # of x264
ENDLESS_GOP = 1_000_000  # constant, not the segment's length: the SPS must not depend on it


class SegmentEncoder:
    """Turns blocks of frames into segments that play when concatenated after `init_segment()`.

    Every segment comes from a fresh single-threaded encoder, so its bytes depend on the arguments alone
    (and on the build of x264): a resumed job writes what the first run would have written.
    """

    def __init__(
        self, width: int, height: int, fps: Fraction, *, crf: int = 16, preset: str = "medium"
    ) -> None:
        for name, size in (("width", width), ("height", height)):
            if size < 2 or size % 2:
                below = max(2, size - size % 2)
                raise ValueError(f"{name}={size}: H.264 4:2:0 needs it even; try {below} or {below + 2}")
            if size > MAX_SIDE:
                raise ValueError(f"{name}={size}: H.264 allows {MAX_SIDE} at most; take less, or PNG files")
        if fps <= 0:
            raise ValueError(f"fps={fps}: need a positive rate; try 16")
        self.width = width
        self.height = height
        self.fps = Fraction(fps)
        self.crf = crf
        self.preset = preset
        self._init = self._encode(None, first_frame=0, sequence=1)

    def init_segment(self) -> bytes:
        """ftyp + moov, which fits every segment of this encoder."""
        return self._init

    def encode(self, frames: NDArray[np.uint8], *, first_frame: int, sequence: int) -> bytes:
        """moof + mdat of uint8 [F, H, W, 3].

        `first_frame` counts from 0 at the start of the video, `sequence` from 1.
        """
        check_frames(frames, self.width, self.height)
        data = self._encode(frames, first_frame=first_frame, sequence=sequence)
        assert data.startswith(self._init), "one encoder made two different headers"
        return data[len(self._init) :]

    def _encode(self, frames: NDArray[np.uint8] | None, *, first_frame: int, sequence: int) -> bytes:
        import av

        buffer = io.BytesIO()
        options = FRAGMENT_OPTIONS | {"fragment_index": str(sequence)}
        with av.open(buffer, "w", format="mp4", options=options) as container:
            stream = self._add_stream(container)
            container.start_encoding()
            for offset, picture in enumerate(() if frames is None else frames):
                frame = _yuv(picture)
                frame.pts = first_frame + offset
                frame.time_base = 1 / self.fps
                frame.duration = 1
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return buffer.getvalue()

    def _add_stream(self, container: "OutputContainer") -> "VideoStream":
        options = {"crf": str(self.crf), "preset": self.preset, "bf": "0", "threads": "1"}
        # sc_threshold=0: or x264 puts a keyframe at every cut, and synthetic pictures are all cuts
        options |= {"g": str(ENDLESS_GOP), "sc_threshold": "0"}
        # x264's assembly and lookahead gave other bytes for equal pictures in 4 of 894 tries (av 18.1)
        options |= {"x264-params": "asm=0", "mbtree": "0", "rc-lookahead": "0"}
        stream = container.add_stream("libx264", rate=self.fps, options=options)
        context = stream.codec_context
        context.width, context.height, context.pix_fmt = self.width, self.height, "yuv420p"
        context.time_base = 1 / self.fps
        context.thread_count = 1
        context.color_range = LIMITED_RANGE
        context.colorspace = context.color_primaries = context.color_trc = BT709
        return stream


def check_frames(frames: NDArray[np.uint8], width: int, height: int) -> None:
    """ValueError unless `frames` is uint8 [F, height, width, 3] with F >= 1."""
    is_uint8 = frames.dtype == np.uint8
    if not is_uint8 or frames.ndim != 4 or not len(frames) or frames.shape[1:] != (height, width, 3):
        raise ValueError(
            f"frames={frames.dtype}{list(frames.shape)}: need uint8[F >= 1, {height}, {width}, 3], RGB"
        )


def _yuv(picture: NDArray[np.uint8]) -> Any:
    import av
    from av.video.reformatter import ColorRange, Colorspace, Interpolation

    # bitexact: swscale's fast paths differ between processors, and the same job must not
    how = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    return frame.reformat(
        format="yuv420p",
        interpolation=int(how),
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
    )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it, durably, when the block ends without an error.

    After kill -9 `path` is either what it was or complete. One writer per path at a time: the temporary
    name is fixed, so that an interrupted attempt is overwritten and does not pile up.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Leaves `data` at `path`, on the disk, or leaves `path` as it was."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def append_segment(path: Path, data: bytes) -> None:
    """Puts a segment at the end of a fragmented MP4, on the disk; killed inside, the file plays without it.

    A file that ends inside a moof cannot be opened by FFmpeg at all. So the first box's header is written
    last: until then it is zeros, which MP4 readers take for a box that fills the rest of the file, and skip.
    """
    with path.open("r+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            _write_all(file, bytes(BOX_HEADER_BYTES) + data[BOX_HEADER_BYTES:])
            os.fsync(file.fileno())
            file.seek(end)
            _write_all(file, data[:BOX_HEADER_BYTES])
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)  # a full disk: as if it had not been tried
            raise


def _write_all(file: io.FileIO, data: bytes) -> None:
    """Write everything: an unbuffered file may take less at a time."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remux(init: Path, segments: Sequence[Path], target: Path, metadata: Mapping[str, str]) -> None:
    """Leaves one MP4 with its index first (fast start) at `target`: the segments' packets, not re-encoded."""
    import av

    if not segments:
        raise ValueError(f"segments=[]: nothing to put into {target}; render at least one block")
    header = init.read_bytes()
    with replacing(target) as temporary:
        options = {"movflags": "faststart+use_metadata_tags"}
        with av.open(temporary, "w", format="mp4", options=options) as output:
            output.metadata.update(metadata)
            stream = None
            end_pts = None
            # one segment at a time: memory stays flat however long the video is
            for segment in segments:
                with av.open(io.BytesIO(header + segment.read_bytes()), "r", format="mp4") as source:
                    if stream is None:
                        stream = output.add_stream_from_template(source.streams.video[0])
                    packets = [packet for packet in source.demux(video=0) if packet.size]
                    end_pts = _check_packets(segment, packets, end_pts)
                    for packet in packets:
                        packet.stream = stream
                        output.mux(packet)


def _check_packets(segment: Path, packets: "list[Packet]", start_pts: int | None) -> int:
    """Where the next segment starts; ValueError if this one is damaged or does not start at `start_pts`."""
    if not packets or any(packet.is_corrupt for packet in packets):
        raise ValueError(f"{segment}: damaged; render its block again")
    if start_pts is not None and packets[0].pts != start_pts:
        raise ValueError(f"{segment}: pts {packets[0].pts}, not {start_pts}; give all segments in order")
    last = packets[-1]
    assert last.pts is not None and last.duration
    return last.pts + last.duration
