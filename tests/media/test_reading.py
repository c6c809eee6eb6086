"""Laws of finished outputs: every frame that was written comes back, by index, whatever it was written as."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vidgen.media.reading import open_output
from vidgen.media.sheet import contact_sheet, save_sheet
from vidgen.media.sink import open_sink

NAMES = ["video.mp4", "video.gif", "video.webp", "pictures"]
NUM_FRAMES = 23


def write(folder: Path, name: str, frames: np.ndarray, fps: Fraction) -> Path:
    height, width = frames.shape[1:3]
    sink = open_sink(folder / name, folder / "job", width, height, fps, {})
    for block, first in enumerate(range(0, len(frames), 9)):
        sink.write(frames[first : first + 9], first_frame=first, block=block)
    return sink.finish()


def all_frames(path, fps, num_frames=None):
    with open_output(path, fps, num_frames) as output:
        return output.frames(range(output.num_frames))


@pytest.mark.parametrize("fps", [Fraction(16), Fraction(24000, 1001), Fraction(50)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_frame_comes_back_in_order_and_by_index(tmp_path, moving_square, differ, name, fps):
    frames = moving_square(NUM_FRAMES)
    path = write(tmp_path, name, frames, fps)
    in_order = all_frames(path, fps)
    assert differ(in_order, frames) < (6 if name.endswith(("gif", "webp")) else 2.5)
    with open_output(path, fps) as output:
        assert output.num_frames == NUM_FRAMES
        indices = [17, 3, 3, 22, 0, 8]
        assert np.array_equal(output.frames(indices), in_order[indices])
        assert np.array_equal(output.frames([21, 1]), in_order[[21, 1]])  # and again, after seeking about


@pytest.mark.parametrize("name", NAMES)
def test_frames_that_do_not_change_are_counted_each(tmp_path, moving_square, differ, name):
    frames = moving_square(NUM_FRAMES)
    frames[5:14] = frames[5]
    frames[20:] = frames[20]
    path = write(tmp_path, name, frames, Fraction(16))
    assert differ(all_frames(path, 16), frames) < 6
    still = np.repeat(frames[:1], 4, axis=0)
    path = write(tmp_path / "still", name, still, Fraction(16))
    # a WebP of equal frames says nothing of their number
    assert differ(all_frames(path, 16, num_frames=4), still) < 6


@pytest.mark.parametrize("name", NAMES)
def test_an_output_of_one_frame_has_one(tmp_path, moving_square, name):
    path = write(tmp_path, name, moving_square(1), Fraction(16))
    assert len(all_frames(path, 16)) == 1


@pytest.mark.parametrize("name", NAMES)
def test_index_out_of_range_is_one_clear_line(tmp_path, moving_square, name):
    path = write(tmp_path, name, moving_square(3), Fraction(16))
    with open_output(path, 16) as output:
        for index in (3, -1):
            with pytest.raises(IndexError, match=rf"^frame {index} of .*it has 3, give 0 to 2$"):
                output.frames([0, index])


def test_a_folder_with_a_picture_missing_is_one_clear_line(tmp_path, moving_square):
    folder = write(tmp_path, "pictures", moving_square(4), Fraction(16))
    (folder / "frame_000001.png").unlink()
    with pytest.raises(ValueError, match=r"pictures: has no frame_000001\.png; render it again$"):
        open_output(folder, 16)
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match=r"bare: has no frame_000000\.png; render it again$"):
        open_output(tmp_path / "bare", 16)


@pytest.mark.parametrize("name", NAMES)
def test_the_sheet_of_an_output_is_the_sheet_of_its_frames(tmp_path, moving_square, name):
    path = write(tmp_path, name, moving_square(NUM_FRAMES), Fraction(16))
    labels = [f"prompt {index}" for index in range(NUM_FRAMES)]
    with open_output(path, 16) as output:
        sheet = save_sheet(output, tmp_path / "sheet.png", num_tiles=6, labels=labels)
        expected = contact_sheet(output.frames(range(NUM_FRAMES)), num_tiles=6, labels=labels)
    with Image.open(sheet) as found:
        assert np.array_equal(np.asarray(found), np.asarray(expected))
