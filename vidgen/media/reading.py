"""Frames of a finished output, by index: MP4, a folder of PNG pictures, GIF or WebP."""

# F frames, H height, W width; pictures are uint8 RGB

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vidgen.media.source import VideoSource


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """A finished output as a sequence of pictures. Close it, or use it in a `with` statement."""

    path: Path
    num_frames: int
    picture: Callable[[int], NDArray[np.uint8]]
    """The frame [H, W, 3] at an index from 0 to num_frames - 1."""
    close: Callable[[], None] = lambda: None

    def frames(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Pictures uint8 [F, H, W, 3] at `indices` (one or more), in that order, repeats allowed."""
        for index in indices:
            if not 0 <= index < self.num_frames:
                raise IndexError(
                    f"frame {index} of {self.path}: it has {self.num_frames}, give 0 to {self.num_frames - 1}"
                )
        shown = {index: self.picture(index) for index in sorted(set(indices))}
        return np.stack([shown[index] for index in indices])

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_output(path: Path, fps: Fraction | float, num_frames: int | None = None) -> Output:
    """The frames of what a sink has finished: .mp4, .gif, .webp or a folder of PNG pictures.

    `fps` is the render's rate, for animations: they keep a run of equal frames as one that stays longer.
    `num_frames` counts where the file does not say: a WebP whose frames are all equal is a still picture.
    """
    if path.is_dir():
        return _of_pictures(path)
    if path.suffix.lower() in (".gif", ".webp"):
        return _of_animation(path, Fraction(fps), num_frames)
    source = VideoSource(path)
    return Output(
        path=path,
        num_frames=source.num_frames,
        picture=lambda index: source.frames([index])[0],
        close=source.close,
    )


def _of_pictures(folder: Path) -> Output:
    from PIL import Image

    matches = [re.fullmatch(r"frame_(\d{6,})\.png", path.name) for path in folder.iterdir()]
    paths = {int(match[1]): folder / match[0] for match in matches if match}
    missing = sorted(set(range(max(paths, default=0) + 1)) - set(paths))
    if missing:
        raise ValueError(f"{folder}: has no frame_{missing[0]:06d}.png; render it again")

    def picture(index: int) -> NDArray[np.uint8]:
        with Image.open(paths[index]) as image:
            return np.asarray(image.convert("RGB"))

    return Output(path=folder, num_frames=len(paths), picture=picture)


def _of_animation(path: Path, fps: Fraction, num_frames: int | None) -> Output:
    from PIL import Image

    image = Image.open(path)
    durations_ms = []
    for stored in range(getattr(image, "n_frames", 1)):
        image.seek(stored)
        image.load()  # a WebP frame's duration is known only then
        durations_ms.append(image.info["duration"])
    ends_ms = list(accumulate(durations_ms))

    def picture(index: int) -> NDArray[np.uint8]:
        middle_ms = 1000 * (index + Fraction(1, 2)) / fps
        # the last: a still picture has no duration
        image.seek(min(bisect_right(ends_ms, middle_ms), len(ends_ms) - 1))
        return np.asarray(image.convert("RGB"))

    counted = round(ends_ms[-1] * fps / 1000) or num_frames or 1
    return Output(path=path, num_frames=counted, picture=picture, close=image.close)
