"""Laws of the contact sheet: its size follows from its arguments, its tiles are the frames it names."""

from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from vidgen.media.sheet import GAP_PX, LINE_PX, contact_sheet, save_sheet


def tile_at(sheet: Image.Image, row: int, column: int, height: int, width: int, num_lines: int) -> np.ndarray:
    top = GAP_PX + row * (height + GAP_PX + num_lines * LINE_PX)
    left = GAP_PX + column * (width + GAP_PX)
    return np.asarray(sheet)[top : top + height, left : left + width]


@pytest.mark.parametrize(
    ("num_frames", "num_tiles", "num_columns", "columns", "rows"),
    [(40, 32, 8, 8, 4), (5, 32, 8, 5, 1), (40, 9, 4, 4, 3), (40, 1, 8, 1, 1), (9, 9, 8, 8, 2)],
)
def test_sheet_size_follows_from_its_tiles(moving_square, num_frames, num_tiles, num_columns, columns, rows):
    sheet = contact_sheet(moving_square(num_frames), num_columns=num_columns, num_tiles=num_tiles)
    assert sheet.size == (GAP_PX + columns * (128 + GAP_PX), GAP_PX + rows * (96 + GAP_PX + LINE_PX))


@pytest.mark.parametrize(("height", "width", "factor"), [(48, 64, 2), (20, 50, 3), (80, 130, 1), (8, 8, 16)])
def test_tiles_are_evenly_spaced_frames_enlarged_by_nearest(moving_square, height, width, factor):
    frames = np.random.default_rng(0).integers(0, 255, (33, height, width, 3), dtype=np.uint8)
    sheet = contact_sheet(frames, num_columns=2, num_tiles=5)
    for place, index in enumerate([0, 8, 16, 24, 32]):
        tile = tile_at(sheet, place // 2, place % 2, height * factor, width * factor, 1)
        assert np.array_equal(tile[::factor, ::factor], frames[index])
        assert np.array_equal(tile[factor - 1 :: factor, factor - 1 :: factor], frames[index])


def test_labels_are_drawn_under_their_tiles_and_stay_there(moving_square):
    frames = moving_square(4)
    labels = ["", "a very long prompt " * 20, "Unbroken" * 40, "short"]
    plain = np.asarray(contact_sheet(frames, labels=[""] * 4))
    labelled = np.asarray(contact_sheet(frames, labels=labels))
    assert labelled.shape == plain.shape
    changed = np.argwhere((plain != labelled).any(axis=2))
    places = {(int(x) - GAP_PX) // (128 + GAP_PX) for _, x in changed}
    assert places == {1, 2, 3}
    assert all(0 <= (x - GAP_PX) % (128 + GAP_PX) <= 128 for _, x in changed)
    assert changed[:, 0].min() >= GAP_PX + 96 + LINE_PX


def test_wrong_arguments_are_refused(moving_square):
    with pytest.raises(ValueError, match="2 labels for 4 frames"):
        contact_sheet(moving_square(4), labels=["a", "b"])
    with pytest.raises(ValueError, match="num_tiles=0"):
        contact_sheet(moving_square(4), num_tiles=0)
    with pytest.raises(ValueError, match="num_columns=0"):
        contact_sheet(moving_square(4), num_columns=0)


class Counted:
    """Frames to be had by index, and which were asked for."""

    def __init__(self, frames: np.ndarray) -> None:
        self.all, self.num_frames, self.asked = frames, len(frames), []

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        self.asked += indices
        return self.all[list(indices)]


def test_a_sheet_of_pictures_reads_only_the_frames_that_it_shows(moving_square, tmp_path):
    pictures = Counted(moving_square(101))
    target = save_sheet(pictures, tmp_path / "sheets" / "video.png", num_tiles=5, num_columns=3)
    assert pictures.asked == [0, 25, 50, 75, 100]
    with Image.open(target) as sheet:
        found = np.asarray(sheet)
    assert np.array_equal(found, np.asarray(contact_sheet(pictures.all, num_tiles=5, num_columns=3)))


def test_wrong_arguments_are_refused_before_anything_is_read(moving_square, tmp_path):
    pictures = Counted(moving_square(4))
    with pytest.raises(ValueError, match="2 labels for 4 frames"):
        save_sheet(pictures, tmp_path / "sheet.png", labels=["a", "b"])
    assert not pictures.asked and not list(tmp_path.iterdir())
