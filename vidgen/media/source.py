"""Frames of a video file, by index or in order, read by decord or PyAV."""

# F frames, H height, W width; pictures are uint8 RGB

from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vidgen.media.listing import Listing, list_frames
from vidgen.media.readers import AvReader, DecordReader

Backend = Literal["auto", "decord", "av"]


class VideoSource:
    """A video file as a sequence of upright pictures; `backend` says who decodes.

    auto is decord where it is installed and reads the file rightly. `times_s` has each frame's seconds from
    the first; `fps` is the mean rate; `pixel_aspect` is the width of a pixel over its height.
    Close it, or use it in a `with` statement. Not for several threads at once.
    """

    def __init__(self, path: Path | str, *, backend: Backend = "auto") -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such video file")
        if backend not in ("auto", "decord", "av"):
            raise ValueError(f"backend={backend!r}: choose auto, decord or av")
        listing = list_frames(self.path)
        self._reader = _open(listing, backend)
        self._listing, self._may_change = listing, backend == "auto"
        self.times_s = listing.times_s()
        self.num_frames = len(self.times_s)
        self.fps = listing.fps
        self.width = listing.width
        self.height = listing.height
        self.pixel_aspect = listing.pixel_aspect

    def frames(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Pictures uint8 [F, H, W, 3] at `indices` (0 and up), in that order, repeats allowed."""
        for index in indices:
            if not 0 <= index < self.num_frames:
                raise IndexError(
                    f"frame {index} of {self.path}: it has {self.num_frames}, give 0 to {self.num_frames - 1}"
                )
        if not len(indices):
            return np.empty((0, self.height, self.width, 3), np.uint8)
        indices = [int(index) for index in indices]
        try:
            return self._reader.frames(indices)
        except ValueError:
            if not self._may_change or self.backend == "av":
                raise
        # decord decodes ahead, and stumbles over damage that is not asked for
        self._reader.close()
        self._reader = AvReader(self._listing)
        return self._reader.frames(indices)

    @property
    def backend(self) -> Backend:
        """Who decodes now; auto changes to PyAV when decord fails at a damaged file."""
        return "decord" if isinstance(self._reader, DecordReader) else "av"

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


def _open(listing: Listing, backend: Backend) -> DecordReader | AvReader:
    if backend == "decord":
        return DecordReader(listing)
    if backend == "auto" and find_spec("decord"):
        with suppress(ValueError):  # PyAV reads it
            return DecordReader(listing)
    return AvReader(listing)
