"""The two decoders of a listed video file: decord and PyAV."""

# F frames, H height, W width; pictures are uint8 RGB

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vidgen.media.listing import Listing, Turn, video_stream

# in others (MPEG-TS, AVI) a seek may land behind its target; decord 0.6 repeats pictures there
EXACT_FORMATS = {"mp4", "webm"}
DECORD_TIME_S = 2e-3  # its times are rounded to 1e-3 s; ones further off are those of other frames


class DecordReader:
    """Reads with decord what it reads exactly; ValueError for a file where it does not."""

    def __init__(self, listing: Listing) -> None:
        import decord

        self._listing = listing
        decord.logging.set_level(decord.logging.QUIET)
        try:
            self._video: Any = decord.VideoReader(str(listing.path), ctx=decord.cpu(0), num_threads=1)
            self._check()
        except (decord.DECORDError, RuntimeError, IndexError) as error:
            raise self._unreadable("it fails (a damaged file?)") from error

    def frames(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        import decord

        try:
            pictures = self._video.get_batch(indices).asnumpy()
        except (decord.DECORDError, RuntimeError) as error:
            raise _damaged(self._listing, indices) from error
        return self._upright(pictures)

    def close(self) -> None:
        self._video = None

    def _check(self) -> None:
        if not EXACT_FORMATS & self._listing.formats:
            raise self._unreadable("it is exact in MP4, MOV, Matroska and WebM only")
        times_s = self._listing.times_s()
        if len(self._video) != len(times_s):
            raise self._unreadable(f"it finds {len(self._video)} frames where {len(times_s)} are shown")
        found_s = self._video.get_frame_timestamp(range(len(times_s)))[:, 0]
        if np.abs(found_s - found_s[0] - times_s).max() > DECORD_TIME_S:
            raise self._unreadable("it finds other time stamps")
        shape = self._upright(self._video[0].asnumpy()).shape
        # with narrow pictures it takes the padding of its rows for a fourth channel
        if shape != (self._listing.height, self._listing.width, 3):
            raise self._unreadable(f"it gives pictures of shape {list(shape)}")

    def _upright(self, pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
        turn, done = self._listing.turn, self._listing.decord_turn
        if turn == done:
            return pictures
        return turn.upright(Turn(quarter_turns=-done.quarter_turns).upright(pictures))

    def _unreadable(self, cause: str) -> ValueError:
        return ValueError(f"{self._listing.path}: decord cannot read it rightly, {cause}; take backend='av'")


class AvReader:
    """Reads with PyAV: decodes on where that is near, else from the keyframe before.

    In formats without exact seeks it decodes on, or from the start: slow, but right.
    """

    def __init__(self, listing: Listing) -> None:
        import av

        self._listing = listing
        self._can_seek = bool(EXACT_FORMATS & listing.formats)
        self._container = av.open(listing.path)
        self._stream = video_stream(listing.path, self._container)
        self._decoded: Iterator[tuple[int | None, Any]] = iter(())
        self._last_pts: int | None = None

    def frames(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        pictures = {index: self._picture(index) for index in sorted(set(indices))}
        return np.stack([pictures[index] for index in indices])

    def close(self) -> None:
        self._decoded = iter(())
        self._container.close()

    def _picture(self, index: int) -> NDArray[np.uint8]:
        import av

        pts = self._listing.pts[index]
        try:
            if not self._is_ahead(pts):
                self._seek(pts)
            for frame_pts, frame in self._decoded:
                self._last_pts = frame_pts
                if frame_pts == pts:
                    return self._listing.turn.upright(frame.to_ndarray(format="rgb24"))
                if frame_pts is not None and frame_pts > pts:
                    break
        except av.FFmpegError as error:
            self._last_pts = None
            raise _damaged(self._listing, [index]) from error
        raise _damaged(self._listing, [index])

    def _is_ahead(self, pts: int) -> bool:
        """Whether decoding on reaches `pts` with no keyframe in between that a seek would gain."""
        last = self._last_pts
        if last is None or last >= pts:
            return False
        return not self._can_seek or self._keyframe_at(last) == self._keyframe_at(pts)

    def _keyframe_at(self, pts: int) -> int:
        return bisect_right(self._listing.key_pts, pts)

    def _seek(self, pts: int) -> None:
        import av

        if self._can_seek:
            self._container.seek(pts, stream=self._stream, backward=True)
        else:
            self._container.close()
            self._container = av.open(self._listing.path)
            self._stream = video_stream(self._listing.path, self._container)
        self._decoded = self._decode()

    def _decode(self) -> Iterator[tuple[int | None, Any]]:
        """Frames with their pts."""
        frames = self._container.decode(self._stream)
        if "avi" not in self._listing.formats:
            return ((frame.pts, frame) for frame in frames)
        # an AVI has times of decoding only, which B-frames take along out of order
        return zip(self._listing.pts, frames, strict=False)


def _damaged(listing: Listing, indices: Sequence[int]) -> ValueError:
    first, last = min(indices), max(indices)
    which = f"frame {first}" if first == last else f"a frame of {first} to {last}"
    return ValueError(f"{listing.path}: {which} is damaged; re-encode the file")
