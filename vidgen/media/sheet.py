"""Contact sheets: a video at a glance, evenly spaced frames with their index and what was asked for."""

# F frames, H height, W width; pictures are uint8 RGB

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vidgen.media.segments import replacing

MIN_TILE_WIDTH_PX = 128
GAP_PX = 6
LINE_PX = 15
FONT_PX = 12
MAX_LABEL_LINES = 2
BACKGROUND = (24, 24, 24)
INK = (230, 230, 230)


class Pictures(Protocol):
    """Frames to be had by index, as VideoSource and `open_output` give them."""

    @property
    def num_frames(self) -> int: ...

    def frames(self, indices: Sequence[int]) -> NDArray[np.uint8]: ...


def contact_sheet(
    frames: NDArray[np.uint8],
    *,
    num_columns: int = 8,
    num_tiles: int = 32,
    labels: Sequence[str] | None = None,
    numbers: Sequence[int] | None = None,
) -> Image.Image:
    """RGB picture of `num_tiles` frames (or all, if fewer) of uint8 [F, H, W, 3], first and last among them.

    `labels` has one text per frame of the video, `numbers` what it is called where its index is not its
    number; small frames are enlarged by a whole number.
    """
    indices = _even_indices(len(frames), num_tiles)
    shown = indices if numbers is None else [numbers[index] for index in indices]
    return _compose(frames[indices], shown, num_columns, _labels_at(indices, labels, len(frames)))


def save_sheet(
    pictures: Pictures,
    target: Path,
    *,
    num_columns: int = 8,
    num_tiles: int = 32,
    labels: Sequence[str] | None = None,
) -> Path:
    """The contact sheet of frames that are there to be read; only those shown are read, one at a time."""
    indices = _even_indices(pictures.num_frames, num_tiles)
    labels_shown = _labels_at(indices, labels, pictures.num_frames)
    tiles = np.stack([pictures.frames([index])[0] for index in indices])
    return _save(_compose(tiles, indices, num_columns, labels_shown), target)


def _save(sheet: Image.Image, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        sheet.save(temporary, "PNG")
    return target


def _even_indices(num_frames: int, num_tiles: int) -> list[int]:
    if num_frames < 1 or num_tiles < 1:
        raise ValueError(f"num_frames={num_frames}, num_tiles={num_tiles}: need at least 1 of each")
    return np.linspace(0, num_frames - 1, min(num_tiles, num_frames)).round().astype(int).tolist()


def _labels_at(indices: list[int], labels: Sequence[str] | None, num_frames: int) -> list[str] | None:
    if labels is None:
        return None
    if len(labels) != num_frames:
        raise ValueError(f"{len(labels)} labels for {num_frames} frames: give one per frame of the video")
    return [labels[index] for index in indices]


def _compose(
    tiles: NDArray[np.uint8], numbers: list[int], num_columns: int, labels: list[str] | None
) -> Image.Image:
    if num_columns < 1:
        raise ValueError(f"num_columns={num_columns}: need 1 or more")
    _, height, width, _ = tiles.shape
    factor = max(1, -(-MIN_TILE_WIDTH_PX // width))
    height, width = height * factor, width * factor
    columns = min(num_columns, len(tiles))
    rows = -(-len(tiles) // columns)
    pitch_x = width + GAP_PX
    pitch_y = height + GAP_PX + LINE_PX * (1 + (MAX_LABEL_LINES if labels else 0))
    sheet = Image.new("RGB", (GAP_PX + columns * pitch_x, GAP_PX + rows * pitch_y), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT_PX)
    for place, (tile, number) in enumerate(zip(tiles, numbers, strict=True)):
        x = GAP_PX + place % columns * pitch_x
        y = GAP_PX + place // columns * pitch_y
        sheet.paste(Image.fromarray(tile).resize((width, height), Image.Resampling.NEAREST), (x, y))
        lines = [str(number), *(_wrapped(labels[place], width, font) if labels else ())]
        for line_number, line in enumerate(lines):
            draw.text((x, y + height + line_number * LINE_PX), line, INK, font)
    return sheet


def _wrapped(text: str, width_px: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """At most MAX_LABEL_LINES lines that fit `width_px`; text cut off ends in three dots."""
    lines: list[str] = []
    words = text.split()
    while words and len(lines) < MAX_LABEL_LINES:
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= width_px:
            count += 1
        lines.append(_cut(" ".join(words[:count]), width_px, font))
        words = words[count:]
    if words:
        lines[-1] = _cut(lines[-1] + " ...", width_px, font)
    return lines


def _cut(text: str, width_px: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(text) <= width_px:
        return text
    while text and font.getlength(text + "...") > width_px:
        text = text[:-1]
    return text + "..."
