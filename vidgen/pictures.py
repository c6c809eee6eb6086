"""The pictures that a job begins with, from files or from memory."""

from pathlib import Path
from typing import Any

import numpy as np

from vidgen.config import JobConfig
from vidgen.families.family import Frames, Pictures


def read_pictures(job: JobConfig, image: Any = None, last_image: Any = None) -> Pictures:
    """What a resolved job begins and ends with, at its size; `image` and `last_image` win over its files.

    A picture is a path, a PIL image, or uint8 [H, W, 3]. ValueError in one line for one that cannot be used.
    """
    assert job.width and job.height and job.fps
    given = job.input
    if given.video is not None and image is None:
        from vidgen.media.given import read_clip

        first: Frames | None = read_clip(given.video, job.width, job.height, given.video_frames, fps=job.fps)
    else:
        first = _picture(image if image is not None else given.image, job)
    last = _picture(last_image if last_image is not None else given.last_image, job)
    return Pictures(first=first, last=last)


def _picture(picture: Any, job: JobConfig) -> Frames | None:
    """[1, H, W, 3]."""
    from vidgen.media.given import fit_picture, read_image

    assert job.width and job.height
    if picture is None:
        return None
    if isinstance(picture, str | Path):
        return read_image(Path(picture), job.width, job.height)[None]
    if not isinstance(picture, np.ndarray):
        picture = np.asarray(picture.convert("RGB"))  # PIL's, whatever its mode
    return fit_picture(picture, job.width, job.height)[None]
