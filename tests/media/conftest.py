"""Small moving pictures that H.264 keeps nearly as they are, and a reader apart from the engine's."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

Pictures = NDArray[np.uint8]


def moving_square(num_frames: int, height: int = 48, width: int = 64, start: int = 0) -> Pictures:
    """uint8 [F, H, W, 3]: a gradient whose brightness names the frame, with a square that moves."""
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    ramp = np.linspace(0, 60, width)[None, :, None]
    for offset in range(num_frames):
        index = start + offset
        frames[offset] = ramp + np.array([20 + 5 * (index % 30), 90, 170 - 3 * (index % 30)])
        left = 2 * (3 * index % (width // 2 - 8))
        frames[offset, 8:24, left : left + 16] = [200, 60, 40]
    return frames


@pytest.fixture(name="moving_square")
def moving_square_fixture() -> Callable[..., Pictures]:
    return moving_square


@pytest.fixture
def decode() -> Callable[[Path], tuple[list[Fraction], Pictures]]:
    def decode(path: Path) -> tuple[list[Fraction], Pictures]:
        """Times in seconds and pictures of every frame that plays, straight from PyAV."""
        with av.open(path) as container:
            frames = list(container.decode(video=0))
        times = [Fraction(frame.pts or 0) * (frame.time_base or 0) for frame in frames]
        pictures = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
        return times, pictures.astype(np.uint8, copy=False)

    return decode


@pytest.fixture
def differ() -> Callable[[Pictures, Pictures], float]:
    def differ(a: Pictures, b: Pictures) -> float:
        """Largest mean absolute difference of two frames at the same place, in grey levels."""
        assert a.shape == b.shape
        return float(np.abs(a.astype(int) - b.astype(int)).mean(axis=(1, 2, 3)).max())

    return differ
