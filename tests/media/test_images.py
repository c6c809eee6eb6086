"""Laws of pictures and animations: lossless, every frame for its time, nothing of an older render."""

from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from vidgen.media.sink import open_sink

NUM_FRAMES = 13


@pytest.mark.parametrize("fps", [Fraction(16), Fraction(24000, 1001)], ids=str)
@pytest.mark.parametrize("name", ["video.gif", "video.webp"])
def test_animations_hold_every_frame_for_its_time_and_loop(tmp_path, moving_square, differ, name, fps):
    frames = moving_square(NUM_FRAMES)
    sink = open_sink(tmp_path / name, tmp_path / "job", 64, 48, fps, {})
    sink.write(frames[:9], first_frame=0, block=0)
    sink.write(frames[9:], first_frame=9, block=1)
    pictures, end_ms = [], 0.0
    with Image.open(sink.finish()) as image:
        assert (getattr(image, "n_frames", 1), image.info["loop"]) == (NUM_FRAMES, 0)
        for index in range(NUM_FRAMES):
            image.seek(index)
            pictures.append(np.asarray(image.convert("RGB")))
            end_ms += image.info["duration"]
            assert abs(end_ms - 1000 * (index + 1) / fps) <= 5  # half a GIF unit, never adding up
    assert differ(np.stack(pictures), frames) < 6


def test_gif_refuses_a_rate_that_browsers_slow_down(tmp_path):
    with pytest.raises(ValueError, match="fps=60: GIF allows at most 50"):
        open_sink(tmp_path / "a.gif", tmp_path / "job", 64, 48, Fraction(60), {})


def test_pictures_are_lossless_and_leftovers_of_a_longer_render_go(tmp_path, moving_square):
    folder = tmp_path / "out" / "pictures"
    folder.mkdir(parents=True)
    for name in ("frame_000099.png", "frame_000000.png", "frame_x.png", "notes.txt"):
        (folder / name).write_bytes(b"old")
    frames = moving_square(6)
    sink = open_sink(folder, tmp_path / "job", 64, 48, Fraction(16), {})
    sink.write(frames, first_frame=0, block=0)
    sink.finish()
    kept = [f"frame_{index:06d}.png" for index in range(6)]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*kept, "frame_x.png", "notes.txt"])
    for name, frame in zip(kept, frames, strict=True):
        with Image.open(folder / name) as picture:
            assert np.array_equal(np.asarray(picture), frame)
