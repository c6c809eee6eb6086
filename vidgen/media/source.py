"""Frames of a video file, by index or in order, read by decord or PyAV."""

# F frames, H height, W width; pictures are uint8 RGB

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Backend = Literal["auto", "decord", "av"]


class _Reader(Protocol):
    num_frames: int
    fps: Fraction
    width: int
    height: int

    def frames(self, indices: Sequence[int]) -> NDArray[np.uint8]: ...

    def close(self) -> None: ...


class VideoSource:
    """A video file as a sequence of pictures; `backend` says who decodes, auto is decord where installed.

    Close it, or use it in a `with` statement. Not for several threads at once.
    """

    def __init__(self, path: Path | str, *, backend: Backend = "auto") -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such video file")
        if backend == "auto":
            backend = "decord" if find_spec("decord") and _decord_can_read(self.path) else "av"
        readers = {"decord": _DecordReader, "av": _AvReader}
        if backend not in readers:
            raise ValueError(f"backend={backend!r}: choose auto, decord or av")
        self.backend = backend
        self._reader: _Reader = readers[backend](self.path)
        self.num_frames = self._reader.num_frames
        self.fps = self._reader.fps
        self.width = self._reader.width
        self.height = self._reader.height

    def frames(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Pictures uint8 [F, H, W, 3] at `indices` (0 and up), in that order, repeats allowed."""
        for index in indices:
            if not 0 <= index < self.num_frames:
                raise IndexError(
                    f"frame {index} of {self.path}: it has {self.num_frames}, give 0 to {self.num_frames - 1}"
                )
        if not len(indices):
            return np.empty((0, self.height, self.width, 3), np.uint8)
        return self._reader.frames([int(index) for index in indices])

    def __len__(self) -> int:
        return self.num_frames

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        """Every picture [H, W, 3] in order, one in memory at a time."""
        for index in range(self.num_frames):
            yield self.frames([index])[0]

    def close(self) -> None:
        """Lets go of the file."""
        self._reader.close()

    def __enter__(self) -> "VideoSource":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _decord_can_read(path: Path) -> bool:
    """False for files that only PyAV reads, such as some narrow ones."""
    try:
        _DecordReader(path).close()
    except ValueError:
        return False
    return True


class _DecordReader:
    def __init__(self, path: Path) -> None:
        import decord

        try:
            self._video: Any = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
            self.num_frames = len(self._video)
            self.height, self.width = self._video[0].shape[:2]
        except (decord.DECORDError, RuntimeError, IndexError) as error:
            raise _not_a_video(path, "decord") from error
        # decord gives a float; 1001 is the largest denominator of a broadcast rate
        self.fps = Fraction(self._video.get_avg_fps()).limit_denominator(1001)

    def frames(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        return self._video.get_batch(indices).asnumpy()

    def close(self) -> None:
        self._video = None


class _AvReader:
    def __init__(self, path: Path) -> None:
        import av

        try:
            self._container = av.open(path)
        except av.FFmpegError as error:
            raise _not_a_video(path, "PyAV") from error
        try:
            self._stream = self._container.streams.video[0]
            # one pass over the packets, without decoding: exact times for files with B-frames or fragments
            packets = [
                (packet.pts, packet.is_keyframe)
                for packet in self._container.demux(self._stream)
                if packet.pts is not None and not packet.is_discard and not packet.is_corrupt
            ]
        except (av.FFmpegError, IndexError) as error:
            self._container.close()
            raise _not_a_video(path, "PyAV") from error
        if not packets:
            self._container.close()
            raise _not_a_video(path, "PyAV")
        self._path = path
        self._pts = sorted(pts for pts, _ in packets)
        self._key_pts = sorted(pts for pts, is_key in packets if is_key)
        self.num_frames = len(self._pts)
        self.fps = Fraction(self._stream.average_rate or self._stream.guessed_rate or 0)
        self.width = self._stream.width
        self.height = self._stream.height
        self._decoded: Iterator[Any] = iter(())
        self._last_pts: int | None = None

    def frames(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        pictures = {index: self._picture(self._pts[index]) for index in sorted(set(indices))}
        return np.stack([pictures[index] for index in indices])

    def close(self) -> None:
        self._decoded = iter(())
        self._container.close()

    def _picture(self, pts: int) -> NDArray[np.uint8]:
        if not self._is_ahead(pts):
            self._seek(pts)
        for frame in self._decoded:
            self._last_pts = frame.pts
            if frame.pts == pts:
                return frame.to_ndarray(format="rgb24")
            if frame.pts > pts:
                break
        raise ValueError(f"{self._path}: the frame at pts {pts} is damaged; re-encode the file")

    def _is_ahead(self, pts: int) -> bool:
        """Whether decoding on reaches `pts` with no keyframe in between that a seek would gain."""
        last = self._last_pts
        return last is not None and last < pts and self._keyframe_at(last) == self._keyframe_at(pts)

    def _keyframe_at(self, pts: int) -> int:
        return bisect_right(self._key_pts, pts)

    def _seek(self, pts: int) -> None:
        self._container.seek(pts, stream=self._stream, backward=True)
        self._decoded = self._container.decode(self._stream)


def _not_a_video(path: Path, reader: str) -> ValueError:
    return ValueError(f"{path}: {reader} finds no video in it; give a video file such as MP4 (H.264)")
